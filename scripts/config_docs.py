"""Write docs/config.md from the fields of `FinetuneConfig`."""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel

from napari_resfinetune.config import FinetuneConfig

HEAD = """# Every setting

Made from `config/schema.py` by `scripts/config_docs.py`. A YAML file holds any of these keys; the same keys go on the
command line as `--set training.epochs=20` and into Python as `rf.train(..., training={"epochs": 20})`.

```yaml
model: vit_b_lm
output: runs/my-cells
data: {images: cells/, labels: masks/}
strategy: {kind: frozen}
training: {epochs: 50}
```
"""


def sections(model: type[BaseModel], prefix: str = "") -> list[tuple[str, type[BaseModel], list[str]]]:
    """Return name, model and table rows of every section, the outermost first."""
    rows, inner = [], []
    for name, field in model.model_fields.items():
        nested = [t for t in (field.annotation, *get_args(field.annotation)) if _is_model(t)]
        for option in nested:
            kind = option.model_fields["kind"].default if "kind" in option.model_fields else None
            inner += sections(option, f"{prefix}{name}." if kind is None else f"{prefix}{name}.kind={kind} ")
        if not nested:
            rows.append(
                f"| `{name}` | {_type(field.annotation)} | `{_value(field.default)}` | {field.description or ''} |"
            )
    return [(prefix.rstrip(". "), model, rows), *inner]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _value(default: Any) -> str:
    return "unset" if default is None else str(list(default) if isinstance(default, tuple) else default)


def _type(annotation: Any) -> str:
    if get_origin(annotation) is tuple:
        return "list"
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    options = [option for option in (get_args(annotation) or (annotation,)) if option is not NoneType]
    if len(options) == 1 and options[0] is not annotation:
        return _type(options[0])
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}
    words = [
        f"`{option}`" if isinstance(option, str) else names.get(get_origin(option) or option, "list")
        for option in options
    ]
    return ", ".join(dict.fromkeys(words))


def main() -> None:
    """Write the page."""
    text = HEAD
    for name, model, rows in sections(FinetuneConfig):
        summary = (model.__doc__ or "").splitlines()[0]
        text += f"\n## {name or 'The whole'}\n\n{summary}\n"
        if rows:
            text += "\n| key | what | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    Path(__file__).parents[1].joinpath("docs", "config.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
