"""python -m moi_jax.convert import DIR --out CKPT: published weights into a checkpoint of ours."""

import argparse
from pathlib import Path

from moi_jax.errors import UserError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moi_jax.convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    importer = commands.add_parser(
        "import",
        help="published weights -> checkpoint",
        description="Reads config.json, *.safetensors and the tokenizer of DIR (Qwen v1).",
    )
    importer.add_argument("directory", type=Path, metavar="DIR", help="the published checkpoint")
    importer.add_argument("--out", type=Path, required=True, metavar="CKPT", help="written whole")
    importer.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="where tokenizer files are, if not in DIR"
    )
    importer.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of the stored parameters (default: as published)",
    )
    args = parser.parse_args()
    import_checkpoint(args.directory, args.out, args.tokenizer, args.dtype)


def import_checkpoint(
    directory: Path, out: Path, tokenizer: Path | None = None, dtype: str | None = None
) -> None:
    """Writes the published checkpoint in `directory` as one of ours at `out`.

    Raises:
      UserError: a file is missing or damaged, or `out` exists or cannot be written; nothing is
        left behind.
    """
    import ml_dtypes  # brings bfloat16 to numpy
    import numpy as np

    from moi_jax.data.jinja_templates import check_template
    from moi_jax.data.prompts import prompts_item
    from moi_jax.data.tokenizer import load_tokenizer
    from moi_jax.models.published import read_published
    from moi_jax.training.checkpoints import ModelItems, check_new, save_model

    check_new(out)
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory; name the folder of a published checkpoint")
    files = load_tokenizer(tokenizer or directory)
    dtypes = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, None: None}
    model, parameters = read_published(directory, dtypes[dtype])
    if files.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {files.vocab_size} ids, the embedding in {directory} only "
            f"{model.vocab_size} rows; is it the tokenizer of this model?"
        )
    report = check_template(files.files, files)
    default = report.default_system_prompt if report.own else model.default_system_prompt
    if report.difference:
        print(f"chat template: {report.template} is the nearest; {report.difference}")
    prompts = prompts_item(default, report.template)
    save_model(out, parameters, ModelItems(model, files.files, prompts))
    print(f"wrote {out}: {model.num_layers} layers, width {model.hidden_size}")


if __name__ == "__main__":
    run_command(main)
