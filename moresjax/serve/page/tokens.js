// The tokens of an answer as elements that a pointer and the arrow keys reach.

import { el } from "./dom.js";

/**
 * The piece of an answer's text that every token stands for, as `[start, end]`.
 *
 * Tokens may carry the blanks around them or not; a token that the text does not show, such as
 * the end token, has an empty piece.
 */
export function pieces(answer) {
  let cursor = 0;
  return answer.tokens.map(({ token }) => {
    const word = token.trim();
    const at = word ? answer.text.indexOf(word, cursor) : -1;
    const blank = at >= 0 && !answer.text.slice(cursor, at).trim();
    const end = blank ? at + word.length : cursor;
    const found = [cursor, end];
    cursor = end;
    return found;
  });
}

/** Brings the tokens in `box` up to date with the answer; tokens that are there stay. */
export function draw(box, answer) {
  const ranges = pieces(answer);
  let shown = box.querySelectorAll(".token");
  ranges.forEach(([start, end], number) => {
    const hidden = start === end;
    const text = hidden ? answer.tokens[number].token.trim() || "␣" : answer.text.slice(start, end);
    let node = shown[number];
    if (!node) {
      node = el("span", {
        class: "token",
        role: "option",
        tabindex: number ? -1 : 0,
        "data-token": number,
        "aria-selected": "false",
      });
      box.querySelector(".rest").before(node);
    }
    if (node.textContent !== text) node.textContent = text;
    node.classList.toggle("hidden-token", hidden);
  });
  shown = box.querySelectorAll(".token");
  for (let number = ranges.length; number < shown.length; number++) shown[number].remove();
  const last = ranges.length ? ranges.at(-1)[1] : 0;
  box.querySelector(".rest").textContent = answer.text.slice(last);
}

/** Marks the tokens that touch one of the ranges `[start, end]` of the text. */
export function mark(box, answer, ranges) {
  const own = pieces(answer);
  box.querySelectorAll(".token").forEach((node, number) => {
    const [start, end] = own[number] ?? [0, 0];
    const differs = ranges.some(([from, to]) => start < to && from < end);
    node.classList.toggle("differs", differs);
    if (differs) node.title = "not in all columns";
    else node.removeAttribute("title");
  });
}

/** The element for the tokens of an answer. */
export function box(label) {
  const attributes = { class: "tokens", role: "listbox", "aria-label": label };
  return el("div", { ...attributes, "aria-orientation": "horizontal" }, el("span", { class: "rest" }));
}

/** Moves the focus from a token with the arrow keys, Home and End; says whether it did. */
export function move(event) {
  const all = [...event.target.parentElement.querySelectorAll(".token")];
  const here = all.indexOf(event.target);
  const target = { ArrowLeft: here - 1, ArrowRight: here + 1, Home: 0, End: all.length - 1 }[event.key];
  if (target === undefined || !all[target]) return false;
  event.target.tabIndex = -1;
  all[target].tabIndex = 0;
  all[target].focus();
  return true;
}
