"""`convert export`: the tensors, the files beside them, and what happens when it cannot be."""

import base64
import json
import shutil
import subprocess
import sys
from typing import ClassVar

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moi_jax.checkpoints.checksums import write_checksums
from moi_jax.checkpoints.hf.exporter import export_checkpoint
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.hf.model_card import model_card
from moi_jax.checkpoints.hf.reader import open_published
from moi_jax.checkpoints.hf.safetensors_writer import plan_shards
from moi_jax.checkpoints.items import ModelItems, find_step
from moi_jax.common.errors import UserError
from moi_jax.convert import parse_size
from moi_jax.models.presets import preset
from moi_jax.text.conversations import Message
from moi_jax.text.prompts import prompts_metadata
from moi_jax.text.rendering import render_prompt
from moi_jax.text.tokenizer import load_tokenizer

from support.published import add_tokenizer, convert, micro_published, same_bits, tensors
from support.runs import ENVIRONMENT, ROOT, small_config, train_here
from support.tokenizers import SAMPLES


@pytest.fixture(scope="module")
def imported(golden, tmp_path_factory):
    """Published folders A and B, and the checkpoints made of them."""
    folder = tmp_path_factory.mktemp("imported")
    for name in ("A", "B"):
        shutil.copytree(golden / name, folder / name)
        add_tokenizer(folder / name)
        (folder / name / "LICENSE").write_text("do what is right")
        import_checkpoint(folder / name, folder / f"{name}-ckpt")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps that began from published bfloat16 weights."""
    import ml_dtypes

    folder = tmp_path_factory.mktemp("trained")
    source = micro_published(folder / "Tiny", ml_dtypes.bfloat16)
    (source / "LICENSE").write_text("do what is right")
    (source / "generation_config.json").write_text('{"eos_token_id": 7, "top_p": 0.8}')
    import_checkpoint(source, folder / "ckpt")
    config = small_config(
        folder,
        model={"preset": None, "init_from": str(folder / "ckpt"), "remat": "none"},
        tokenizer={"path": None},
        train={"steps": 2, "global_batch_rows": 2},
        eval={"every": 2},
    )
    train_here(config)
    return folder


def test_the_card_of_parameters_that_began_at_random_names_no_base():
    template = load_tokenizer(SAMPLES / "tokenizer").template
    card = model_card(ModelItems(preset("tiny"), {}, prompts_metadata(None, template)))
    assert "The weights were trained from a random initialisation." in card
    assert "base_model" not in card


@pytest.mark.parametrize("name", ["A", "B"])
def test_import_then_export_gives_the_same_bits(imported, tmp_path, name):
    export_checkpoint(imported / f"{name}-ckpt", tmp_path / "out")
    assert same_bits(imported / name, tmp_path / "out")
    assert open_published(tmp_path / "out").config == open_published(imported / name).config
    for file in ("tokenizer.json", "generation_config.json", "LICENSE"):
        original, exported = ((f / file).read_text() for f in (imported / name, tmp_path / "out"))
        if file.endswith(".json"):
            original, exported = json.loads(original), json.loads(exported)
        assert original == exported


def test_bfloat16_and_back_gives_the_same_bits(tmp_path):
    import ml_dtypes

    source = micro_published(tmp_path / "Tiny", ml_dtypes.bfloat16)
    import_checkpoint(source, tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "out", max_shard_size=300_000)
    assert same_bits(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    import_checkpoint(tmp_path / "out", tmp_path / "again")  # its index is a good one
    wide = tmp_path / "wide"
    export_checkpoint(tmp_path / "again", wide, dtype="float32")
    for name, tensor in tensors(wide).items():
        np.testing.assert_array_equal(tensor, tensors(source)[name].astype(np.float32))
        break


def test_shards_are_as_large_as_asked_and_load_in_safetensors(imported, tmp_path):
    from safetensors.numpy import load_file

    export_checkpoint(imported / "B-ckpt", tmp_path / "out", max_shard_size=400_000)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert len(shards) > 2
    held = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == held.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in held.values())
    for shard in shards:
        assert sum(t.nbytes for t in load_file(shard).values()) <= 400_000
    expected = tensors(imported / "B")
    assert all(np.array_equal(held[name], expected[name]) for name in expected)


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1), st.integers(1, 100))
def test_every_tensor_is_in_one_shard_in_order_and_none_is_over_the_limit(sizes, limit):
    named = {str(n): size for n, size in enumerate(sizes)}
    shards = plan_shards(named, limit)
    assert [name for shard in shards for name in shard] == list(named)
    for shard, following in zip(shards, [*shards[1:], None], strict=True):
        filled = sum(named[name] for name in shard)
        assert shard
        assert filled <= limit or len(shard) == 1
        assert following is None or filled + named[following[0]] > limit


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("2GiB", 2**31), ("7B", 7)]
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "0GB", "5XB", "-5GB", "5 GB x"])
def test_what_is_no_size_is_refused(text, tmp_path):
    done = convert("export", "x", "--out", tmp_path / "out", f"--max-shard-size={text}")
    assert done.returncode == 2
    assert "is no size; write it as 5GB or 800MB" in done.stderr


def test_a_trained_checkpoint_exports_its_parameters_with_an_account_of_itself(trained, tmp_path):
    import moi_jax

    done = convert("export", trained / "run", "--out", tmp_path / "out", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    assert "licence" not in done.stderr
    assert not (tmp_path / "out" / "optimizer").exists()
    held = tensors(tmp_path / "out")
    model, _ = moi_jax.load(trained / "run")
    np.testing.assert_array_equal(held["transformer.wte.weight"], model.embedding.table[...])
    gate = held["transformer.h.1.mlp.w2.weight"]
    np.testing.assert_array_equal(gate, np.asarray(model.layers.mlp.gate.kernel[...])[1].T)
    # It has learnt to end its turns: im_end is among its ends now, and its own end still is.
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    ends = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["added_tokens"]
    im_end = next(token["id"] for token in ends if token["content"] == "<|im_end|>")
    assert im_end in generation["eos_token_id"]
    assert 7 in generation["eos_token_id"]
    assert generation["top_p"] == 0.8
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "# Tiny, fine-tuned",
        "`Tiny` and were trained further",
        "licence and notice files are here: LICENSE",
        "| maths | You are a mathematician. |",
        "| maths | path: maths.jsonl | not told | 1.0 |",
        "| optimizer.learning_rate | 0.001 |",
        "| eval/mean/loss |",
        "Step 2.",
    ):
        assert line in card
    assert str(trained) not in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "do what is right"


def test_a_trained_checkpoint_stores_large_parameters_by_layer(trained, monkeypatch):
    """So that an export reads one layer at a time."""
    from moi_jax.checkpoints import parameter_files
    from moi_jax.models.parameters import parameter_specs
    from moi_jax.models.presets import preset

    monkeypatch.setattr(parameter_files, "CHUNK_BYTES", 10_000)
    whole = parameter_files.expected(preset("tiny"), np.dtype(np.float32))
    cut = parameter_files.save_args(whole)
    assert cut["layers"]["mlp"]["gate"]["kernel"].shard_axes == (0,)
    assert cut["embedding"]["table"].shard_axes == ()
    assert {
        a.chunk_byte_size for a in (cut["head"]["kernel"], cut["layers"]["mlp"]["up"]["kernel"])
    } == {10_000}
    assert parameter_specs(preset("tiny"))["layers.mlp.gate.kernel"].shape[0] == 4
    assert find_step(trained / "run").name == "2"


def test_qwen_v1_as_qwen2_is_the_same_model_up_to_its_length(imported, golden, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    done = convert("export", imported / "B-ckpt", "--out", tmp_path / "out", "--as", "qwen2")
    assert "as qwen2: exact up to 64 tokens" in done.stderr
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, local_files_only=True
    )
    arrays = np.load(golden / "B" / "logits.npz")
    with torch.no_grad():
        logits = model(torch.from_numpy(arrays["x32"].astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(logits, arrays["eval_32"], atol=2e-5, rtol=0)


def test_qwen_v1_as_qwen2_has_a_tokenizer_that_others_read(tmp_path):
    """Of a checkpoint that holds a qwen.tiktoken alone: here the 256 bytes and one merge."""
    transformers = pytest.importorskip("transformers")
    source = micro_published(tmp_path / "source", np.float32)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    tokens = [*(bytes([byte]) for byte in range(256)), b"He", b"ll", b"Hell"]
    lines = [f"{base64.b64encode(token).decode()} {n}" for n, token in enumerate(tokens)]
    (source / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    import_checkpoint(source, tmp_path / "ckpt")
    export_checkpoint(tmp_path / "ckpt", tmp_path / "out", as_family="qwen2")
    assert not (tmp_path / "out" / "qwen.tiktoken").exists()
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    ours = load_tokenizer(source)
    assert fast("Hello, Hé!")["input_ids"] == ours.encode("Hello, Hé!")
    ids = fast.apply_chat_template([{"role": "user", "content": "Hello"}], return_dict=False)
    prompt = render_prompt([Message("user", "Hello")], ours, "You are a helpful assistant.")
    assert prompt[: len(ids)] == ids
    assert (fast.eos_token_id, fast.pad_token_id) == (ours.template.end, ours.template.pad)


def test_the_exported_template_gives_the_default_prompt_to_whom_has_none(imported, tmp_path):
    export_checkpoint(imported / "B-ckpt", tmp_path / "out")
    template = jinja2.Template((tmp_path / "out" / "chat_template.jinja").read_text())
    user = {"role": "user", "content": "Hi"}
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    default = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert template.render(messages=[user], add_generation_prompt=True) == default + asked
    own = {"role": "system", "content": "Be brief."}
    rendered = template.render(messages=[own, user], add_generation_prompt=True)
    assert rendered == "<|im_start|>system\nBe brief.<|im_end|>\n" + asked


def test_a_source_without_a_licence_is_warned_of(golden, tmp_path):
    shutil.copytree(golden / "A", tmp_path / "A")
    add_tokenizer(tmp_path / "A")
    import_checkpoint(tmp_path / "A", tmp_path / "ckpt")
    done = convert("export", tmp_path / "ckpt", "--out", tmp_path / "out")
    assert "warning: A came without a licence file" in done.stderr


def test_an_existing_target_is_not_overwritten(imported, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists, and nothing is overwritten; name a new directory"):
        export_checkpoint(imported / "A-ckpt", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def without_files_of_the_store(step):
    for path in (step / "parameters").rglob("d/*"):
        path.unlink()


def with_another_width(step):
    path = step / "model" / "metadata"
    path.write_text(path.read_text().replace('"mlp_width": 128', '"mlp_width": 64'))
    write_checksums(step)  # so that the width is what is wrong


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda step: shutil.rmtree(step / "parameters"), "is no checkpoint"),
        (without_files_of_the_store, "is damaged or incomplete"),
        (lambda step: (step / "model" / "metadata").write_text("{"), "is damaged or incomplete"),
        (with_another_width, "layers.mlp.down.kernel has shape"),
    ],
)
def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(imported, tmp_path, damage, message):
    shutil.copytree(imported / "B-ckpt", tmp_path / "ckpt")
    damage(tmp_path / "ckpt")
    with pytest.raises(UserError) as error:
        export_checkpoint(tmp_path / "ckpt", tmp_path / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


FULL_DISK = """
mount -t tmpfs -o size=600k none "$1" || exit 99
"$2" -m moi_jax.convert import "$3/B" --out "$1/ckpt"; echo "import $?"
"$2" -m moi_jax.convert export "$3/B-ckpt" --out "$1/out"; echo "export $?"
echo "left: $(ls -A "$1")"
"""


def test_a_full_disk_is_one_line_and_leaves_nothing(imported, tmp_path):
    if not shutil.which("unshare"):
        pytest.skip("no unshare to mount a small disk with")
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh",
         tmp_path, sys.executable, imported],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    if "import" not in done.stdout:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    assert done.stdout == "import 2\nexport 2\nleft: \n"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert [line.split(": ", 2)[2] for line in errors] == [
        "no space left on the device; nothing was left behind"
    ] * 2
    assert "Traceback" not in done.stderr


def test_a_write_that_fails_is_one_line_and_leaves_nothing(imported, tmp_path):
    """A limit on the size of files does what a full disk does, and needs no mount."""
    limited = ["sh", "-c", 'ulimit -f 100; exec "$@"', "sh", sys.executable, "-m"]
    for arguments in (("import", imported / "B"), ("export", imported / "B-ckpt")):
        done = subprocess.run(
            [*limited, "moi_jax.convert", *arguments, "--out", tmp_path / "out"],
            capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert f"error: cannot write {tmp_path}/out: " in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.iterdir())


class Hub:
    """What of the hub's client is used, without the network."""

    calls: ClassVar[list] = []
    taken = False

    def __init__(self, token):
        self.calls.append(("token", token))

    def create_repo(self, repository, private, exist_ok):
        from huggingface_hub.errors import HFValidationError

        if self.taken:
            raise HFValidationError("409: You already created\nthis model repo")
        self.calls.append(("create", repository, private, exist_ok))
        return f"https://huggingface.co/{repository}"

    def upload_folder(self, repo_id, folder_path):
        self.calls.append(("upload", repo_id, sorted(p.name for p in folder_path.iterdir())))


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    monkeypatch.setenv("HF_TOKEN", "secret")
    return Hub


def test_push_makes_a_new_private_repository_with_the_token_of_the_environment(
    imported, tmp_path, hub, monkeypatch, capsys
):
    push(imported, tmp_path, monkeypatch)
    assert ("token", "secret") in hub.calls
    assert ("create", "me/model", True, False) in hub.calls
    assert hub.calls[-1][:2] == ("upload", "me/model")
    assert "model.safetensors" in hub.calls[-1][2]
    assert "uploaded https://huggingface.co/me/model" in capsys.readouterr().out


def test_a_repository_that_exists_is_left_alone_and_the_export_is_kept(
    imported, tmp_path, hub, monkeypatch
):
    monkeypatch.setattr(hub, "taken", True)
    with pytest.raises(UserError, match="is written but was not uploaded as me/model: 409"):
        push(imported, tmp_path, monkeypatch)
    assert (tmp_path / "out" / "config.json").exists()


def test_push_without_a_token_is_refused_before_any_work(imported, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="HF_TOKEN"):
        push(imported, tmp_path, monkeypatch)
    assert not list(tmp_path.iterdir())


def push(imported, tmp_path, monkeypatch):
    import signal

    from moi_jax import convert as command

    arguments = ["export", imported / "A-ckpt", "--out", tmp_path / "out", "--push", "me/model"]
    monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
    before = signal.getsignal(signal.SIGTERM)
    try:
        command.main()
    finally:
        signal.signal(signal.SIGTERM, before)
