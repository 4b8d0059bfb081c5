// Which words of answers that stand side by side are not in all of them.

/** The words of a text with their first and last character: `[{word, start, end}]`. */
export function words(text) {
  return Array.from(text.matchAll(/\S+/g), (found) => ({
    word: found[0],
    start: found.index,
    end: found.index + found[0].length,
  }));
}

/** The longest common subsequence of two lists, as pairs of places. */
export function common(one, other) {
  const rows = one.length + 1;
  const columns = other.length + 1;
  const best = new Uint32Array(rows * columns);
  for (let i = one.length - 1; i >= 0; i--) {
    for (let j = other.length - 1; j >= 0; j--) {
      best[i * columns + j] =
        one[i] === other[j]
          ? best[(i + 1) * columns + j + 1] + 1
          : Math.max(best[(i + 1) * columns + j], best[i * columns + j + 1]);
    }
  }
  const pairs = [];
  for (let i = 0, j = 0; i < one.length && j < other.length; ) {
    if (one[i] === other[j]) pairs.push([i++, j++]);
    else if (best[(i + 1) * columns + j] >= best[i * columns + j + 1]) i++;
    else j++;
  }
  return pairs;
}

/** For every text the character ranges `[start, end]` of the words that not all texts share. */
export function differing(texts) {
  const split = texts.map(words);
  // The places, in every text, of the words that all texts so far have in common.
  let shared = split[0].map((_, place) => [place]);
  for (const own of split.slice(1)) {
    const first = shared.map((places) => split[0][places[0]].word);
    const pairs = common(first, own.map((each) => each.word));
    shared = pairs.map(([i, j]) => [...shared[i], j]);
  }
  return split.map((own, column) => {
    const kept = new Set(shared.map((places) => places[column]));
    return own.filter((_, place) => !kept.has(place)).map(({ start, end }) => [start, end]);
  });
}
