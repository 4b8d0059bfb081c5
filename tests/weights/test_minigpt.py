"""MiniGPT-v2 from the files of its authors: logits are those of a definition in torch."""

# Configurations of transformers are made of dicts, whose values no type checker can tell apart.
# pyright: reportArgumentType=false, reportCallIssue=false

import json
import logging

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_tokenizers import KINDS
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import moresjax as mj
from moresjax.cli import main
from moresjax.core.layout import TokenKind
from moresjax.core.parameter_names import named_parameters
from moresjax.models.vision import OPENAI_MEAN, OPENAI_STD
from moresjax.testing.hf_llms import randomised

WIDTH, MLP, HEADS, PATCH, BLOCKS = 176, 24, 2, 56, 2
TRAINED, SIDE = 4, 8  # patches a side at 224 and at 448 pixels
TOKENIZER = KINDS["sentencepiece with bos"]
PHOTO = np.random.default_rng(0).integers(0, 256, (448, 448, 3)).astype(np.uint8)
QUESTION = "<image>\nWhat is in the image?"


def eva_file(blocks: int = BLOCKS) -> dict[str, torch.Tensor]:
    """An EVA-ViT by its names, with the norm and head that are not used."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, TRAINED**2 + 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        **{"norm.weight": (WIDTH,), "norm.bias": (WIDTH,), "head.weight": (5, WIDTH)},
    }
    for i in range(blocks):
        own = {
            **{f"norm{n}.{leaf}": (WIDTH,) for n in (1, 2) for leaf in ("weight", "bias")},
            **{"attn.q_bias": (WIDTH,), "attn.v_bias": (WIDTH,)},
            **{"attn.qkv.weight": (3 * WIDTH, WIDTH), "attn.proj.weight": (WIDTH, WIDTH)},
            **{"attn.proj.bias": (WIDTH,), "mlp.fc1.weight": (MLP, WIDTH), "mlp.fc1.bias": (MLP,)},
            **{"mlp.fc2.weight": (WIDTH, MLP), "mlp.fc2.bias": (WIDTH,)},
        }
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in own.items()}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name, x in found.items():
        x *= x[0].numel() ** -0.5 if x.ndim > 1 and "embed" not in name[:9] else 0.3
        if "norm" in name and name.endswith("weight"):
            x += 1
    found["patch_embed.proj.weight"] *= 0.5
    return found


def encoded(p: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The tokens behind the last block, written down from the description of the architecture."""
    x = F.conv2d(pixels, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=PATCH)
    x = torch.cat([p["cls_token"].expand(len(pixels), -1, -1), x.flatten(2).mT], dim=1)
    grid = p["pos_embed"][:, 1:].mT.reshape(1, WIDTH, TRAINED, TRAINED)
    grid = F.interpolate(grid, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    x = x + torch.cat([p["pos_embed"][:, :1], grid.flatten(2).mT], dim=1)
    for i in range(BLOCKS):
        start = f"blocks.{i}."
        b = {k.removeprefix(start): t for k, t in p.items() if k.startswith(start)}
        y = F.layer_norm(x, (WIDTH,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        wq, wk, wv = b["attn.qkv.weight"].chunk(3)
        q, k, v = y @ wq.T + b["attn.q_bias"], y @ wk.T, y @ wv.T + b["attn.v_bias"]
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        shares = (q @ k.mT * (WIDTH // HEADS) ** -0.5).softmax(-1)
        y = (shares @ v).transpose(1, 2).flatten(2)
        x = x + y @ b["attn.proj.weight"].T + b["attn.proj.bias"]
        y = F.layer_norm(x, (WIDTH,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = F.gelu(y @ b["mlp.fc1.weight"].T + b["mlp.fc1.bias"])
        x = x + y @ b["mlp.fc2.weight"].T + b["mlp.fc2.bias"]
    return x


class Original:
    """The files, and the model that they are the weights of."""

    def __init__(self, folder) -> None:
        self.folder, generator = folder, torch.Generator().manual_seed(1)
        text = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "intermediate_size": 48}
        text |= {"num_hidden_layers": 2, "num_attention_heads": 4}
        llm = randomised(LlamaForCausalLM(LlamaConfig(**text)))
        llm.save_pretrained(folder / "llama")
        TOKENIZER.save_pretrained(folder / "llama")
        lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        self.llm = get_peft_model(llm, lora).eval()
        self.trained = {
            "llama_proj.weight": torch.randn((32, 4 * WIDTH), generator=generator) * 0.02,
            "llama_proj.bias": torch.randn(32, generator=generator),
        }
        for name, x in self.llm.state_dict().items():
            if "lora_" in name:
                x.normal_(0, 0.3, generator=generator)
                self.trained[f"llama_model.{name}"] = x
        self.encoder = eva_file()
        self.norm = {f"ln_vision.{leaf}": torch.randn(WIDTH, generator=generator) for leaf in NORM}
        torch.save(self.encoder, self.eva)
        torch.save({"model": self.trained | self.norm, "epoch": 3}, self.checkpoint)

    @property
    def eva(self):
        return self.folder / "eva_vit_g.pth"

    @property
    def checkpoint(self):
        return self.folder / "checkpoint.pth"

    def logits(self, row, norm: dict[str, torch.Tensor]) -> np.ndarray:
        """Those of a prompt with one image."""
        mean, std = (torch.tensor(x)[:, None, None] for x in (OPENAI_MEAN, OPENAI_STD))
        pixels = (torch.tensor(PHOTO).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            x = encoded(self.encoder, pixels[None])
            x = F.layer_norm(x, (WIDTH,), norm["ln_vision.weight"], norm["ln_vision.bias"], 1e-5)
            x = x[:, 1:].reshape(1, SIDE**2 // 4, 4 * WIDTH)
            x = x @ self.trained["llama_proj.weight"].T + self.trained["llama_proj.bias"]
            h = self.llm.get_input_embeddings()(torch.tensor(row.tokens)[None])
            h[:, torch.tensor(row.kind == TokenKind.IMAGE)] = x
            return self.llm(inputs_embeds=h).logits.numpy()


NORM = ("weight", "bias")


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Original:
    return Original(tmp_path_factory.mktemp("minigpt"))


def run(original, out, *options, vision=None, checkpoint=None) -> list[str]:
    vision, checkpoint = vision or original.eva, checkpoint or original.checkpoint
    given = ["--vision", str(vision), "--minigpt", str(checkpoint), *options]
    return ["import", str(original.folder / "llama"), str(out), *given]


def check(model, original, norm) -> None:
    row = model.prompts.row(QUESTION, PHOTO)
    ours = np.asarray(model.logits(QUESTION, PHOTO))[0, : len(row)]
    assert np.abs(ours - original.logits(row, norm)[0]).max() <= 1e-4


def test_logits_are_those_of_the_definition(original, tmp_path):
    out = tmp_path / "run"
    assert main(run(original, out, "--allow-pickle", "--keep-lora")) == 0
    model = mj.load(out)
    check(model, original, original.norm)
    assert model.tuning == "lora:rank=4,alpha=16.0,targets=q;v"
    text = "".join(model.prompts.token_texts(model.prompts.row(QUESTION, PHOTO)))
    assert model.config.visual_tokens == SIDE**2 // 4
    assert model.processor.image.size == 448
    assert "[INST] <Img>" in text.replace("▁", " ")


def test_safetensors_need_no_permission(original, tmp_path, caplog):
    """Names of peft 0.2, buffers of the LLM, and no norm, which then is one without parameters.

    Without --keep-lora the LLM has it inside.
    """
    old = {name.replace(".default", ""): x for name, x in original.trained.items()}
    old["llama_model.base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(old, tmp_path / "checkpoint.safetensors")
    save_file(original.encoder, tmp_path / "eva.safetensors")
    names = {"vision": "eva.safetensors", "checkpoint": "checkpoint.safetensors"}
    files = {key: tmp_path / name for key, name in names.items()}
    with caplog.at_level(logging.WARNING):
        assert main(run(original, tmp_path / "run", **files)) == 0
    assert "block 40, norm and head of EVA are not used" in caplog.text
    none = {"ln_vision.weight": torch.ones(WIDTH), "ln_vision.bias": torch.zeros(WIDTH)}
    model = mj.load(tmp_path / "run")
    check(model, original, none)
    assert model.tuning == "none"
    # A run may start from the file alone.
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["model"]["vision"]["num_layers"] == BLOCKS


def test_an_encoder_that_trained_is_in_the_checkpoint(original, tmp_path):
    grid = original.encoder["pos_embed"][:, 1:].mT.reshape(1, WIDTH, TRAINED, TRAINED)
    grid = F.interpolate(grid, size=(SIDE, SIDE), mode="bicubic", align_corners=False)
    place = torch.cat([original.encoder["pos_embed"][:, :1], grid.flatten(2).mT], dim=1)
    whole = {n: x for n, x in original.encoder.items() if not n.startswith(("norm", "head"))}
    whole = {f"visual_encoder.{name}": x for name, x in (whole | {"pos_embed": place}).items()}
    content = {"model": original.trained | original.norm | whole}
    content["config"] = {"model": {"lora_alpha": 32}}
    torch.save(content, tmp_path / "all.pth")
    other = {name: x + 1 for name, x in original.encoder.items()}
    torch.save(other, tmp_path / "eva.pth")
    files = {"vision": tmp_path / "eva.pth", "checkpoint": tmp_path / "all.pth"}
    command = run(original, tmp_path / "run", "--allow-pickle", "--keep-lora", **files)
    assert main(command) == 0
    model = mj.load(tmp_path / "run")
    assert model.tuning == "lora:rank=4,alpha=32.0,targets=q;v"
    found = named_parameters(model.mllm)
    kernel = np.asarray(found["vision.blocks.attn.k.kernel"].get_value())[1].T
    expected = original.encoder["blocks.1.attn.qkv.weight"].chunk(3)[1]
    np.testing.assert_array_equal(kernel, expected.numpy())


def changed(original, **changes):
    """A checkpoint with some tensors replaced, or left out where they are None."""
    own = original.trained | original.norm
    own |= {name.replace("__", "."): x for name, x in changes.items()}
    return {"model": {name: x for name, x in own.items() if x is not None}}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("pickle", "is pickled, and pickles run code; allow it with --allow-pickle"),
        ("no file", "none.pth is not a file"),
        ("no connector", "as MiniGPT-v2's, lacks 1 tensors: llama_proj.weight"),
        ("a novel tensor", "as MiniGPT-v2's, has unknown 1 tensors: queries"),
        ("another LLM", "llama_proj.weight is (16, 704) instead of (32, 704)"),
        ("no tensors", "holds no tensors by name: epoch is of kind int"),
        ("a LoRA of half the layers", "lacks tensors"),
        ("another encoder", "--minigpt belongs to one EVA-ViT"),
        ("not EVA", "holds no EVA-ViT: its pos_embed is not there"),
        ("odd heads", "holds no EVA-ViT with heads of 88 features"),
    ],
)
def test_bad_files_are_told_in_a_sentence(what, message, original, tmp_path, capsys):
    vision, checkpoint = original.eva, tmp_path / "bad.pth"
    layer = "llama_model__base_model__model__model__layers__1__self_attn__q_proj__lora_A"
    contents = {
        "no connector": changed(original, llama_proj__weight=None),
        "a novel tensor": changed(original, queries=torch.ones(3)),
        "another LLM": changed(original, llama_proj__weight=torch.ones(16, 704)),
        "no tensors": {"epoch": 3},
        "a LoRA of half the layers": changed(original, **{f"{layer}__default__weight": None}),
    }
    torch.save(contents.get(what, {}), checkpoint)
    if what == "no file":
        checkpoint = tmp_path / "none.pth"
    if what == "another encoder":
        vision = original.folder / "llama"
    if what == "not EVA":
        vision = original.checkpoint
        torch.save({"cls_token": torch.ones(1, 1, 4)}, vision := tmp_path / "eva.pth")
    if what == "odd heads":
        odd = eva_file() | {"cls_token": torch.ones(1, 1, 100)}
        torch.save(odd, vision := tmp_path / "eva.pth")
    options = [] if what == "pickle" else ["--allow-pickle"]
    files = {"vision": vision, "checkpoint": checkpoint}
    assert main(run(original, tmp_path / "run", *options, **files)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()
