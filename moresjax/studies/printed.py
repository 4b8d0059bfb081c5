"""The scores that two papers print, for the tables whose runs `recipes.py` has.

Per paper and table the names of the columns, then a line per row. Where a cell has a run of its own
the columns are those of the recipes; otherwise they are the headers of what the run is scored on.
"""

_SEVEN = "VQAv2 GQA TextVQA SciQA-IMG POPE MM-Vet MMMU Avg"
_FOUR = "SciQA-IMG VizWiz IconQA-txt IconQA-blank"
_MRT = "MME Text-VQA VSR SNLI-VE CIFAR-10 CIFAR-100 MNIST POPE MMAvg"

_TABLE_2 = """\
3B Adapter | 92.3 62.9 93.5 95.8
3B LoRA | 93.9 61.6 93.9 96.5
3B OFT | 86.3 42.0 87.8 42.0
3B IA3 | 90.2 58.4 84.5 94.7
3B MoReS-B | 89.7 59.2 84.0 94.2
7B Adapter | 82.7 59.7 72.1 71.6
7B LoRA | 87.6 60.6 77.7 70.2
7B OFT | 78.3 55.1 19.4 22.7
7B IA3 | 83.8 54.3 65.1 70.4
7B MoReS-B | 83.6 54.2 64.2 70.2
13B Adapter | 87.9 61.4 78.2 73.0
13B LoRA | 92.1 62.0 80.2 73.2
13B OFT | 82.7 59.5 3.4 22.3
13B IA3 | 90.5 54.6 73.8 71.7
13B MoReS-B | 89.5 54.3 74.9 71.5"""

_TEXTS: dict[tuple[str, str], tuple[str, str]] = {
    ("llava-steering", "1"): (
        _SEVEN,
        """\
FT | 79.2 61.6 57.4 71.9 87.2 35.0 38.2 61.5
Adapter | 77.1 58.9 53.5 68.1 86.7 29.4 34.2 58.2
LoRA | 77.6 59.7 53.8 71.6 87.9 33.3 35.6 59.9
OFT | 75.1 55.3 52.9 69.1 87.6 31.0 35.6 58.3
IA3 | 74.5 52.1 49.3 72.2 86.9 30.9 34.3 57.1
MoReS-B | 74.1 52.1 48.5 70.0 87.6 30.3 35.3 56.9
MoReS-L | 74.0 51.6 49.3 71.6 87.2 33.3 34.4 57.3
MoReS-H | 74.2 51.8 48.3 71.9 88.2 31.1 35.8 57.4""",
    ),
    ("llava-steering", "2"): (
        _FOUR,
        "\n".join(f"LLaVA Steering-{line}" for line in _TABLE_2.split("\n")),
    ),
    ("llava-steering", "3"): (
        "SciQA-IMG VizWiz IconQA",
        """\
Small FT | 33.8 51.2 68.1
Small Adapter | 81.0 57.4 72.4
Small LoRA | 84.0 58.5 74.2
Small OFT | 79.2 43.2 35.9
Small IA3 | 79.9 50.5 73.0
Small MoReS-L | 78.2 55.0 69.7
Medium FT | 78.2 58.9 92.2
Medium Adapter | 92.1 60.6 93.2
Medium LoRA | 92.9 60.5 92.7
Medium OFT | 86.4 44.4 45.5
Medium IA3 | 91.9 57.1 90.6
Medium MoReS-L | 92.1 56.6 89.9
Large FT | 88.9 59.4 95.7
Large Adapter | 92.4 61.3 95.2
Large LoRA | 93.9 61.8 96.0
Large OFT | 86.4 44.2 43.7
Large IA3 | 90.3 57.9 93.8
Large MoReS-L | 89.8 57.7 93.5""",
    ),
    ("llava-steering", "4"): (
        "hellaswag mmlu",
        """\
LoRA | 70.5 55.3
Adapter | 66.4 52.9
OFT | 69.1 54.7
IA3 | 71.8 56.8
MoReS (Ours) | 71.9 57.0""",
    ),
    ("llava-steering", "6"): (
        "POPE_Acc Hard_Acc Figure_Acc Question_Acc",
        """\
Full | 87.2 37.4 18.5 44.4
LoRA | 86.7 34.6 16.7 43.0
Adapter | 87.9 36.2 18.2 44.8
OFT | 85.1 33.9 14.1 36.2
IA3 | 86.9 39.3 18.5 45.0
MoReS | 88.2 42.6 19.4 46.1""",
    ),
    ("llava-steering", "7"): (
        _FOUR,
        """\
1 | 89.6 59.2 84.0 94.2
2 | 89.7 59.2 83.9 94.0
4 | 89.5 58.7 83.8 94.1
8 | 89.6 58.9 83.7 93.9""",
    ),
    ("llava-steering", "8"): (
        _FOUR,
        """\
1% | 89.7 59.2 84.0 94.1
25% | 89.9 59.0 80.2 93.8
50% | 88.9 59.0 79.8 92.6
100% | 85.8 60.5 67.7 87.8""",
    ),
    ("llava-steering", "9"): (
        _SEVEN,
        """\
[0,2,4,] | 74.1 52.0 48.3 71.6 87.1 32.8 35.3 57.3
[0,3,6,] | 74.1 51.7 48.1 70.7 87.0 32.7 33.2 56.8
[0,4,8,] | 74.1 51.9 48.5 71.2 87.2 31.5 34.4 57.0
All Layer | 74.0 51.6 49.3 71.6 87.2 33.3 34.4 57.3""",
    ),
    ("llava-steering", "10"): (
        _SEVEN,
        """\
Shallow (0-15) | 74.3 51.6 48.6 70.3 87.5 34.9 34.4 57.3
Middle (8-23) | 74.3 52.3 48.3 71.5 87.1 32.0 32.6 56.9
Deep (16-31) | 74.2 51.5 48.2 71.8 87.1 33.3 36.7 57.7
All Layer | 74.0 51.6 49.3 71.6 87.2 33.3 34.4 57.3""",
    ),
    ("mrt", "1"): (
        _MRT,
        """\
LLaVAAlign | 1110.82 32.62 50.16 34.51 80.00 58.04 52.79 59.10 52.46
LLaVAFT | 1587.26 37.26 53.76 43.35 92.97 63.73 94.27 80.82 66.59
LoRA | 1393.67 39.20 52.95 44.56 90.10 45.90 83.42 72.33 61.21
APrompt | 1406.63 35.26 53.12 45.58 85.74 50.27 84.63 76.16 61.52
PTUM | 1354.62 34.28 53.75 30.86 82.88 57.63 94.29 80.31 62.00
VPT | 1398.74 33.68 53.93 32.62 76.49 52.31 94.73 79.60 60.48
ReFT | 1473.25 36.34 49.75 39.66 90.43 57.53 88.21 78.35 62.90
M2PT | 1503.98 34.48 53.19 32.89 89.29 59.14 95.54 81.26 63.68
MixLoRA | 1509.61 40.42 49.18 36.69 91.40 59.27 87.68 78.48 63.30
MRT | 1580.40 40.62 51.47 33.34 96.96 57.20 95.63 79.30 64.93""",
    ),
    ("mrt", "3"): (
        "MME MMAvg",
        """\
(a) First Layer | 1329.84 60.57
(b) Odd Layers | 1468.21 63.35
(c) First Half | 1440.32 61.89
(d) Latter Half | 1447.41 62.65
(e) All Layers | 1580.40 64.93""",
    ),
    ("mrt", "S3"): (
        "mme_sampled",
        "Prefix Only | 1465.32\nSuffix Only | 1497.35\nPrefix & Suffix | 1580.40\nAll | 1233.90",
    ),
    ("mrt", "S5"): (
        "seed_bench gqa",
        """\
LLaVAFT | 57.4 53.5
LoRA | 56.3 51.3
MixLoRA | 55.9 52.2
M2PT | 57.1 50.3
MRT | 57.6 52.7""",
    ),
    ("mrt", "S6"): (
        "MME MMAvg",
        """\
LLM | 1473.25 62.90
Cross-modality | 1165.33 53.67
Vision encoder | 1342.46 60.83
All (MRT) | 1580.40 64.93""",
    ),
    ("mrt", "Figure 4"): (
        "mme_sampled",
        """\
visual 6, multimodal 4 | 1580.40
visual 4, multimodal 8 | 1452.12
visual 8, multimodal 8 | 1505.32""",
    ),
    ("mrt", "S7"): (
        "mme_sampled",
        "M2PT | 1503.98\nMixLoRA | 1509.61\nVPT | 1398.74\nLoRA | 1393.67\nMRT | 1580.40",
    ),
    ("mrt", "S8"): (
        "mme_sampled",
        """\
LLaVAFT | 1587.26
VPT | 1398.74
LoRA | 1393.67
M2PT | 1503.98
MixLoRA | 1509.61
MRT | 1580.40""",
    ),
    ("mrt", "Figure 6"): ("MME", "length 4 | 1580.40\nlength 6 | 1571.32"),
}


def _parsed(headers: str, text: str) -> dict[str, dict[str, float]]:
    names = [header.replace("_Acc", " Acc") for header in headers.split()]
    rows = (line.rpartition(" | ")[::2] for line in text.split("\n"))
    return {
        row: dict(zip(names, map(float, numbers.split()), strict=True)) for row, numbers in rows
    }


# By paper and table, row and column: the score that is printed.
PRINTED = {table: _parsed(*texts) for table, texts in _TEXTS.items()}
PRINTED["mrt", "S5"] |= _parsed(
    "mme_sampled",
    """\
MiniGPT-v2 | 1464.88
MiniGPT-v2 LoRA | 1358.14
MiniGPT-v2 ReFT | 1346.65
MiniGPT-v2 MixLoRA | 1418.48
MiniGPT-v2 M2PT | 1421.02
MiniGPT-v2 MRT | 1439.73""",
)
