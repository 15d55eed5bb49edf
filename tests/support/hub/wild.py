"""Two hundred repositories in the layouts that are found on the Hub, good, useless, broken and hostile ones.

All are made of the same few small files: `Wild(folder)` makes them, `Wild.seed(hub)` puts the repositories on
a fake Hub, and `Wild.repositories` says how a rescue must end each.
"""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from safetensors.numpy import load_file, save_file

import kcv2diffusers
from support.hub.hub import Hub
from support.random_pipelines import random_pipeline

OWNER = "wild"
PARTS = ("unet", "text_encoder", "vae_decoder", "vae_encoder")
UNET, TEXT = PARTS[:2]
CONFIG = "kcv2diffusers.json"
CARD = "---\nlicense: creativeml-openrail-m\ntags: [keras, '<script>alert(1)</script>']\n---\n# A model\n"
COUNT = 200
TOKENIZER_WORDS = 691  # of the tiny base, whose tokenizer the pipelines have
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}


@dataclass
class Repository:
    """A repository: files by path, copied from `paths` or with the text of `texts`.

    `reason` is a part of the reason of an outcome that is not "published". `own` are the components of the
    pipeline whose weights come from here, those of the rest from the base.
    """

    name: str
    paths: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    outcome: str = "skipped"
    reason: str = ""
    own: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        return self.name if "/" in self.name else f"{OWNER}/{self.name}"


class Wild:
    """The files in `folder`, and the repositories that are made of them.

    `pipeline` has the weights of every good checkpoint, `base` other weights of the same sizes.
    `saved_models` has the SavedModel folders `unet` and `text_encoder` of KerasCV, each with its heads.
    """

    def __init__(self, folder: Path, saved_models: dict[str, Path] | None = None) -> None:
        self.folder = folder
        self.pipeline = random_pipeline(folder / "pipeline")
        self.base = self._other(folder / "base")
        kcv2diffusers.to_keras(self.pipeline, out=folder / "legacy", format="h5")
        kcv2diffusers.to_keras(self.pipeline, out=folder / "weights")
        kcv2diffusers.convert(self.pipeline, out=folder / "single.safetensors")
        self.bad = self._damaged(folder / "bad")
        self.repositories = self._all(saved_models or {})

    def _other(self, folder: Path) -> Path:
        shutil.copytree(self.pipeline, folder)
        for name in WEIGHTS.values():
            save_file({k: v + 1 for k, v in load_file(folder / name).items()}, folder / name)
        return folder

    def _damaged(self, folder: Path) -> dict[str, Path]:
        """Files that are no good checkpoints, by what is wrong with them."""
        folder.mkdir()
        whole, rng = (self.folder / "legacy" / "unet.h5").read_bytes(), np.random.default_rng(0)
        contents = {
            **{f"cut-{share}": whole[: len(whole) * share // 10] for share in (1, 5, 9)},
            "page": b"<!DOCTYPE html><html><body>Entry not found</body></html>",
            "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 3",
            "empty": b"",
            "noise": rng.bytes(5000),
        }
        found = {}
        for name, data in contents.items():
            found[name] = folder / name
            found[name].write_bytes(data)
        for name in ("shape", "nan", "digits"):
            found[name] = folder / f"{name}.h5"
            if name == "digits":  # a model of something else
                with h5py.File(found[name], "w") as file:
                    file.create_dataset("dense/kernel:0", data=np.zeros((784, 10), "float32"))
                continue
            shutil.copy(self.folder / "legacy" / "unet.h5", found[name])
            with h5py.File(found[name], "r+") as file:
                names: list[str] = []
                file.visititems(
                    lambda n, item, names=names: names.append(n) if hasattr(item, "dtype") else None
                )
                first = next(n for n in names if getattr(file[n], "ndim", 0) == 2)
                value = file[first][()]
                del file[first]
                file[first] = value[:, :-1] if name == "shape" else value * np.nan
        return found

    def archive(self, part: str) -> Path:
        """The checkpoint of a part as a .keras archive."""
        path = self.folder / f"{part}.keras"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("metadata.json", '{"keras_version": "3.4.1", "date_saved": "2024-06-01@00:00:00"}')
            file.writestr("config.json", '{"class_name": "Functional", "config": {}}')
            file.write(self.folder / "weights" / f"{part}.weights.h5", "model.weights.h5")
        return path

    def whole_model(self, part: str) -> Path:
        """The checkpoint of a part as `model.save("x.h5")` writes it: weights in a group of their own."""
        path = self.folder / f"{part}-whole.h5"
        with h5py.File(self.folder / "legacy" / f"{part}.h5") as old, h5py.File(path, "w") as new:
            group = new.create_group("model_weights")
            for name, value in old.attrs.items():
                group.attrs[name] = value
            for name in old:
                old.copy(name, group)
            new.attrs["keras_version"] = "2.12.0"
            new.attrs["model_config"] = '{"class_name": "Functional", "config": {"layers": []}}'
        return path

    def _all(self, saved_models: dict[str, Path]) -> list[Repository]:
        found = [*self._good(), *self._of_keras(saved_models), *self._nothing_to_do(), *self._broken()]
        found += [Repository(f"empty-{number}", reason="empty") for number in range(COUNT - len(found))]
        assert len({each.id for each in found}) == COUNT
        return found

    def files(self, container: str, *parts: str, at: str = "", card: bool = True) -> dict[str, Path]:
        """Checkpoints of parts in "legacy" or "weights", by their paths in a repository."""
        end = {"legacy": ".h5", "weights": ".weights.h5"}[container]
        found = {f"{at}{part}{end}": self.folder / container / f"{part}{end}" for part in parts}
        found[f"{at}{CONFIG}"] = self.folder / "legacy" / CONFIG
        if card:
            (self.folder / "README.md").write_text(CARD)
            found["README.md"] = self.folder / "README.md"
        return found

    def _good(self) -> list[Repository]:
        every, both = ("unet", "text_encoder", "vae"), ("unet", "text_encoder")
        legacy = {UNET: self.folder / "legacy" / "unet.h5"}
        done = {"outcome": "published"}
        rest = self.files("legacy")
        texts = {"logs/events.out.tfevents.1": "x" * 100, "notes.txt": "x", ".DS_Store": "x"}
        single = {"dog.safetensors": self.folder / "single.safetensors", **rest}
        archive = {f"{part}.keras": self.archive(part) for part in (UNET, TEXT)}
        found = [
            *(Repository(f"four-{n}", self.files("legacy", *PARTS), own=every, **done) for n in (1, 2, 3)),
            *(Repository(f"new-{n}", self.files("weights", *PARTS), own=every, **done) for n in (1, 2)),
            *(
                Repository(f"unet-{n}", self.files("legacy", UNET), own=("unet",), **done)
                for n in (1, 2, 3, 4)
            ),
            *(Repository(f"two-{n}", self.files("legacy", UNET, TEXT), own=both, **done) for n in (1, 2)),
            Repository("deep", self.files("weights", UNET, TEXT, at="weights/run-1/"), own=both, **done),
            Repository("archive", {**archive, **rest}, own=both, **done),
            Repository("whole", {"model_unet.h5": self.whole_model(UNET), **rest}, own=("unet",), **done),
            Repository("logs", self.files("legacy", UNET), texts, own=("unet",), **done),
            Repository("odd-name", {"a b [1]*.h5": legacy[UNET], **rest}, own=("unet",), **done),
            *(Repository(f"single-{n}", single, own=every, **done) for n in (1, 2)),
        ]
        for number in (1, 2):
            reason = f"the text encoder of wild/pair-{number}"
            found += [
                Repository(f"pair-{number}", self.files("weights", UNET), own=both, **done),
                Repository(f"pair-{number}-text-encoder", self.files("weights", TEXT), reason=reason),
            ]
        return found

    def _of_keras(self, saved_models: dict[str, Path]) -> list[Repository]:
        """Genuine SavedModels, each part in a repository of its own, as in 2023."""
        if not saved_models:
            return []
        found = []
        for part, end in ((UNET, ""), (TEXT, "-text-encoder")):
            root = saved_models[part]
            paths = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
            own = Repository(f"corgi{end}", {**paths, "README.md": self.files("legacy")["README.md"]})
            if part == UNET:
                own.outcome, own.own = "published", ()  # compared with nothing here: other weights
            else:
                own.reason = "the text encoder of wild/corgi"
            found.append(own)
            cut = {name: path for name, path in own.paths.items() if ".data-" not in name}
            if part == UNET:
                found.append(Repository("corgi-cut", cut, outcome="failed"))
        return found

    def _nothing_to_do(self) -> list[Repository]:
        pipeline = {name: "{}" for name in ("model_index.json", "unet/config.json")}
        tables = (
            ("pipeline", 14, pipeline, "a diffusers pipeline already"),
            ("component", 2, {"unet/config.json": "{}", "unet/x.safetensors": "x"}, "pipeline already"),
            ("card", 8, {"README.md": CARD, ".gitattributes": "x"}, "empty"),
            ("pickle-bin", 4, {"pytorch_model.bin": "x", "config.json": "{}"}, "pickled weights"),
            ("pickle-ckpt", 5, {"sd/model.ckpt": "x"}, "pickled weights"),
            ("pickle-pt", 3, {"a.pt": "x", "b.pkl": "x"}, "pickled weights"),
            ("lora", 4, {"pytorch_lora_weights.safetensors": "x"}, "a LoRA"),
            ("lora-hub", 2, {"dog.lora.h5": "x"}, "a LoRA"),
            ("concept", 5, {"learned_embeds.bin": "x", "token_identifier.txt": "<cat>"}, "textual inversion"),
            ("bert", 6, {"tf_model.h5": "x", "config.json": "{}"}, "a model of transformers"),
            ("llm", 6, {"model.safetensors": "x", "config.json": "{}"}, "a model of transformers"),
            ("onnx", 4, {"unet.onnx": "x"}, "a format that is not read"),
            ("pictures", 4, {"1.png": "x", "2.jpg": "x"}, "no weights among its 2 files"),
            ("zip", 3, {"unet.zip": "x"}, "an archive"),
            (
                "graph",
                3,
                {"saved_model.pb": "x", "keras_metadata.pb": "x"},
                "part of a TensorFlow checkpoint",
            ),
            ("merges", 3, {"a.safetensors": "x", "b.safetensors": "x"}, "several .safetensors"),
            ("epochs", 4, {f"unet_{n}.h5": "x" for n in range(3)}, "3 checkpoints for the UNet"),
        )
        found = [
            Repository(f"{name}-{number}", texts=texts, reason=reason)
            for name, count, texts, reason in tables
            for number in range(count)
        ]
        bare = self.files("legacy", UNET, card=False)
        found += [Repository(f"unlicensed-{n}", bare, reason="states no license") for n in range(5)]
        found += [
            Repository(f"taken-{n}", self.files("legacy", UNET), reason="exists already") for n in range(3)
        ]
        hostile = (
            "<script>alert(1)<",
            "=HYPERLINK(1)",
            "..",
            "a\n[9/9] b",
            "\x1b[2J",
            "a--b",
            "-rf",
            "a\udc80",
        )
        return found + [Repository(f"{OWNER}/{name}", reason="not a name") for name in hostile]

    def _broken(self) -> list[Repository]:
        reasons = {
            "page": "a web page",
            "pointer": "Git LFS",
            "empty": "empty",
            "shape": "",
            "nan": "NaN",
            "digits": "",
            "noise": "",
            **{f"cut-{share}": "" for share in (1, 5, 9)},
        }
        rest = {n: p for n, p in self.files("legacy").items()}
        found = []
        for kind, reason in reasons.items():
            for number in range(3):
                paths = {"unet.h5": self.bad[kind], **rest}
                found.append(Repository(f"bad-{kind}-{number}", paths, outcome="failed", reason=reason))
        paths = {"unet.keras": self.bad["noise"], **rest}
        found.append(Repository("bad-archive", paths, outcome="failed"))
        texts = {"../../../../tmp/evil.h5": "x", "unet.h5": "x"}
        found += [
            Repository(f"escape-{n}", texts=texts, outcome="failed", reason="outside of the repository")
            for n in range(2)
        ]
        long = {"x" * 300 + ".h5": "x", "README.md": CARD}
        found.append(Repository("long-name", texts=long, outcome="failed", reason="File name too long"))
        names = {"<img src=x onerror=alert(1)>.h5": "x", "\x1b[31m\n[1/1] wild/x: published.h5": "x"}
        found += [
            Repository(f"hostile-{n}", texts=names, reason="several checkpoints", outcome="skipped")
            for n in (1,)
        ]
        config = {CONFIG: '{"unet": {"attention_head_dim": "; rm -rf /"}}'}
        mixed = {"unet.h5": self.folder / "legacy" / "unet.h5", "README.md": rest["README.md"]}
        return [*found, Repository("bad-config", mixed, config, outcome="failed")]

    def seed(self, hub: Hub, owner: str = "alice") -> None:
        """Put the repositories on a fake Hub, and those of `owner` that are in the way of some."""
        for each in self.repositories:
            paths = {name: str(path) for name, path in each.paths.items()}
            hub.ask("seed", {"repo": each.id, "paths": paths, "files": each.texts})
        for number in range(2):
            hub.ask("seed", {"repo": f"{owner}/taken-{number}", "files": {"README.md": "mine"}})
        record = '{"tool": "x", "parts": {}, "bases": [], "origins": [], "dtypes": {}}'
        hub.ask("seed", {"repo": f"{owner}/taken-2", "files": {"conversion.json": record}})
