// Pairs of visible things that overlap, each cut to what the boxes that scroll it show.
() => {
  const shown = (rect, node) => {
    let [x0, y0, x1, y1] = [rect.left, rect.top, rect.right, rect.bottom];
    for (let up = node.parentElement; up; up = up.parentElement) {
      if (getComputedStyle(up).overflowY === "visible" && getComputedStyle(up).overflowX === "visible") continue;
      const own = up.getBoundingClientRect();
      [x0, y0] = [Math.max(x0, own.left), Math.max(y0, own.top)];
      [x1, y1] = [Math.min(x1, own.right), Math.min(y1, own.bottom)];
    }
    return x1 - x0 > 1 && y1 - y0 > 1 ? [x0, y0, x1, y1] : null;
  };
  const owns = (node) => node.matches("button, input, select, textarea, canvas, svg, .button, .swatch") ||
    [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  const things = [...document.body.querySelectorAll("*")].filter((node) =>
    node.checkVisibility({ visibilityProperty: true }) && owns(node) &&
    !node.closest(".unseen, .skip, #file, svg *, dialog:not([open])") && !node.parentElement.closest("button, svg"));
  const boxes = things.flatMap((node) => [...node.getClientRects()].map((rect) => ({ node, box: shown(rect, node) })))
    .filter(({ box }) => box);
  const bad = [];
  boxes.forEach(({ node: one, box: a }, n) => boxes.slice(n + 1).forEach(({ node: two, box: b }) => {
    if (one.contains(two) || two.contains(one)) return;
    const [w, h] = [Math.min(a[2], b[2]) - Math.max(a[0], b[0]), Math.min(a[3], b[3]) - Math.max(a[1], b[1])];
    if (w > 1 && h > 1) bad.push(`${one.outerHTML.slice(0, 80)} and ${two.outerHTML.slice(0, 80)}: ${w} x ${h}`);
  }));
  const wide = boxes.filter(({ node, box }) => (box[0] < -1 || box[2] > innerWidth + 1));
  return { bad, wide: wide.map(({ node }) => node.outerHTML.slice(0, 80)), count: boxes.length,
           scrolls: document.scrollingElement.scrollWidth - innerWidth };
}
