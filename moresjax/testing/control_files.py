"""Small official downloads that control reads: CIFAR-10 with ten classes, and TextVQA."""

import io

import numpy as np
from PIL import Image

from moresjax.data.cifar import CIFAR10_CLASSES
from moresjax.data.control.image_sets import CIFAR_SPLITS


def photo(width: int = 12, height: int = 12) -> bytes:
    """A small image in a file format of its own."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (width, 0, height)).save(file, "PNG")
    return file.getvalue()


def cifar10() -> dict[str, bytes | str]:
    """An image of every class in each file; the classes of a file are in another order."""
    rng = np.random.default_rng(0)
    files: dict[str, bytes | str] = {
        "cifar10/batches.meta.txt": "".join(f"{name}\n" for name in (*CIFAR10_CLASSES, ""))
    }
    for names in CIFAR_SPLITS.values():
        for name in names:
            images = rng.integers(0, 256, (10, 3 * 32 * 32), dtype=np.uint8)
            labels = rng.permutation(10).astype(np.uint8)
            files[f"cifar10/{name}"] = np.column_stack([labels, images]).tobytes()
    return files


def _word(text: str, left: float, top: float, width: float, height: float) -> dict:
    box = {"top_left_x": left, "top_left_y": top, "width": width, "height": height}
    turned = {name: 0.0 for name in ("rotation", "roll", "pitch", "yaw")}
    return {"word": text, "bounding_box": box | turned}


def textvqa() -> dict[str, bytes | dict]:
    """Four questions in each split, three of which are about an attribute, on two photos."""
    asked = [
        ("what is the name of this product?", "aa", ["gum plus"] * 6 + ["gum"] * 4),
        ("What is the brand, please?", "aa", ["acme"] * 10),
        ("what is the color of the sign?", "bb", ["red"] * 10),
        ("what is the namesake of it?", "bb", ["no"] * 10),
    ]
    files: dict[str, bytes | dict] = {
        f"textvqa/train_images/{name}.jpg": photo(8 + n) for n, name in enumerate(("aa", "bb"))
    }
    for split in ("train", "val"):
        rows = [
            {"question": text, "image_id": image, "question_id": n, "answers": answers}
            for n, (text, image, answers) in enumerate(asked)
        ]
        # A word that is cut by the border, and one outside of the photo.
        words = [_word("GUM", 0.5, 0.25, 0.25, 0.25), _word("PLUS", 0.75, 0.5, 0.5, 0.125)]
        words.append(_word("?", 1.25, 0.5, 0.5, 0.125))
        found = [{"image_id": "aa", "ocr_tokens": ["GUM", "PLUS", "?"], "ocr_info": words}]
        found.append({"image_id": "bb", "ocr_tokens": [], "ocr_info": []})
        files[f"textvqa/TextVQA_0.5.1_{split}.json"] = {"data": rows}
        files[f"textvqa/TextVQA_Rosetta_OCR_v0.2_{split}.json"] = {"data": found}
    return files
