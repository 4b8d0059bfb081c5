"""The tokeniser of the COCO caption evaluation, without Java.

That evaluation (Chen et al. 2015, `tylin/coco-caption`) runs Stanford's PTB tokeniser in lower case
and drops a list of punctuation tokens. The rules here cover what occurs in captions. One of them
had to be chosen: there, whether a caption that ends in a lone initial ("Highway D.") keeps that
period depends on the next caption of the file; here it never does.
"""

import re

# The list is compared with lower-case tokens there, so that brackets (-lrb-) are not dropped.
_DROPPED = {
    '"',
    "''",
    "'",
    "``",
    "`",
    ".",
    "?",
    "!",
    ",",
    ":",
    "-",
    "--",
    "---",
    "...",
    ";",
    "\u200b",
}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_TYPOGRAPHIC = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": " - ",
        "\u2014": " - ",
        "\u2026": "...",
    }
)
_SPLIT = {
    "cannot": ("can", "not"),
    "gimme": ("gim", "me"),
    "gonna": ("gon", "na"),
    "gotta": ("got", "ta"),
    "lemme": ("lem", "me"),
    "wanna": ("wan", "na"),
    "y'all": ("y'", "all"),
    "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
}
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|prof|rev|hon|gen|gov|sen|rep|sgt|capt|lt|col|st|ave|blvd|rd|mt|ft|jr|sr|co|corp"
    "|inc|ltd|bros|dept|est|vs|etc|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tues|wed"
    "|thurs|fri"
)
_SENTENCE_STARTS = (
    "A|An|The|This|That|These|It|He|She|They|We|You|Her|Their|Our|There|Here|In|At|But|So|If|As|When"
    "|While|After|What|One|Some|Many|Other|Then|However|Since|More|Such|Now|Once|Yet|According"
)

# A lone letter's period ends a sentence, rather than abbreviating a name, if one starts after it.
_FINAL_INITIAL = re.compile(rf"(?<![\w.'])([A-Za-z])\.(?=\s*$|\s+(?:{_SENTENCE_STARTS})\b)")
_TOKEN = re.compile(
    rf"""
      https?://[^\s)]*[^\s).,!?] | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
    | \d+\ \d+/\d+                                      # 22 3/4
    | (?i:(?:[a-z]\.)+(?![a-z]) | (?:{_ABBREVIATIONS})\. | no\.(?=\ *\d))
    | (?i:[a-z]+(?=n't(?!\w)) | n't(?!\w))              # do n't
    | (?i:'(?:s|m|d|re|ve|ll|em|tis|twas|n'|\d\ds?)(?!\w))
    | [-+]?\d+(?:[:.,/-]\d+)*(?!-?\w)                   # 12:45, 1,000, 3.5, 1/2, -11
    | [A-Z]+&[A-Z]+ | (?i:[a-z]{{1,2}}'(?!(?:s|m|d|re|ve|ll)(?!\w))[a-z]+)   # R&B, o'clock
    | \w+(?:[-/.]\w+)*
    | \.+ | -+ | '' | `` | [?!]+ | \S
    """,
    re.VERBOSE,
)


def tokenize(caption: str) -> list[str]:
    """Lower-case tokens without punctuation.

    A mixed fraction ("22 3/4") is one token with a no-break space inside, like the original's.

    >>> tokenize("A red kite, isn't it?")
    ['a', 'red', 'kite', 'is', "n't", 'it']
    """
    text = _FINAL_INITIAL.sub(r"\1 ", caption.translate(_TYPOGRAPHIC))
    tokens = []
    for token in _TOKEN.findall(text):
        token = token.lower()
        if token in _SPLIT:
            tokens += _SPLIT[token]
        elif token not in _DROPPED and token.strip("."):
            tokens.append(_BRACKETS.get(token, token.replace(" ", "\xa0")))
    return tokens
