"""report.html of a small hand-made run directory, compared with figures computed by hand."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from moi_jax.common.errors import UserError
from moi_jax.training.report import CHART_POINTS, PALETTE, thin, write_report

CONFIG = """\
model: {preset: qwen-7b, init_from: null}
data:
  strategy: moi
  sequence_length: 4096
  domains:
  - {name: chat, prompt: You are a helpful assistant.}
  - {name: _code, prompt: 'You write a < b && $x^'}
train: {global_batch_rows: 64}
"""
FIRST_EVAL = {
    "step": 0,
    **{"eval/chat/loss": 2.0, "eval/chat/default_prompt/loss": 2.0},
    **{"eval/_code/loss": 3.0, "eval/_code/default_prompt/loss": 3.5},
    **{"eval/mean/loss": 2.5, "eval/mean/default_prompt/loss": 2.75},
}
LAST_EVAL = {
    **{"eval/chat/loss": 1.0, "eval/chat/default_prompt/loss": 1.0},
    **{"eval/_code/loss": 1.5, "eval/_code/default_prompt/loss": 1.75},
    **{"eval/mean/loss": 1.25, "eval/mean/default_prompt/loss": 1.375},
}
DRAWN_ONCE = {"mean_repeats": 1.0, "max_repeats": 1, "held_out": 1, "used": 4, "occurrences": 4}
MIXTURE = {
    **{"fill": 0.99612, "rows": 12, "steps_per_epoch": 3, "tokens": 400, "loss_tokens": 160},
    **{"moved_share": 0.125, "domains_per_row": 2.0},
    "domains": {
        "chat": {"read": 1008, "dropped": {"too_long": 2, "duplicate": 1}, **DRAWN_ONCE}
        | {"tokens": 300, "loss_tokens": 100},
        "_code": {"read": 5, "dropped": {}, **DRAWN_ONCE, "tokens": 100, "loss_tokens": 60},
    },
}


def training_line(step: int, token_loss: float | None, speed: float) -> dict:
    return {
        **{"step": step, "epoch": 0, "row": 64 * step, "loss": token_loss},
        **{"token_loss": token_loss, "learning_rate": 1e-5, "grad_norm": token_loss},
        **{"tokens_per_second": speed, "loss_tokens_per_second": speed / 2, "fill": 0.99},
        **{"domain/chat/loss": token_loss, "domain/_code/loss": None},
    }


METRICS = [
    FIRST_EVAL,
    training_line(1, 3.0, 100.0),
    training_line(2, None, 900.0) | {"skipped": True},
    training_line(3, 1.25, 300.0) | LAST_EVAL,
]


def sample(step: int, system: str, answer: str) -> dict:
    return {
        **{"step": step, "domain": "_code", "prompt": "Reverse <a> list & return it."},
        **{"system": system, "system_prompt": f"the {system} prompt", "answer": answer},
    }


SAMPLES = [
    sample(0, "own", "before, own"),
    sample(0, "default", "before, default"),
    sample(2, "own", "on the way"),
    sample(3, "own", "\n  def f(x):\n    <script>alert(1)</script>"),
    sample(3, "default", "after, default"),
]


class Page(HTMLParser):
    """The tags with their attributes, the text of the page and the text of its <h2> headings."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.headings: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.tags and self.tags[-1][0] == "h2" and data.strip():
            self.headings.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)


def write_run(run_dir: Path, metrics=METRICS, mixture=MIXTURE, samples=SAMPLES) -> Path:
    run_dir.mkdir(exist_ok=True)
    (run_dir / "config.yaml").write_text(CONFIG)
    for name, lines in (("metrics", metrics), ("samples", samples)):
        if lines:
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (run_dir / f"{name}.jsonl").write_text(text)
    if mixture:
        (run_dir / "mixture.json").write_text(json.dumps(mixture))
    return run_dir


def report(run_dir: Path) -> str:
    return write_report(run_dir).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report(write_run(tmp_path_factory.mktemp("runs") / "my_run"))


def cards(html: str) -> dict[str, str]:
    return dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", html))


def table_rows(html: str) -> list[str]:
    """Returns the words of every table row, without markup."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return [" ".join(re.sub(r"<[^>]+>", " ", row).split()) for row in rows]


def test_headline_shows_the_figures_of_the_run(html: str) -> None:
    assert cards(html) == {
        "steps": "3",
        "training loss": "3.000 → 1.250",
        "mean held-out loss": "2.500 → 1.250",
        "median tokens/s": "300",
        "fill of rows": "99.61 %",
        "skipped steps": "1",
    }
    summary = "qwen-7b · strategy moi · rows of 4,096 tokens · 64 rows per step"
    assert summary in html
    assert "<h1>my_run</h1>" in html


def test_held_out_table_shows_first_last_and_gap_of_each_domain(html: str) -> None:
    rows = table_rows(html)
    assert "chat 2.000 → 1.000 2.000 → 1.000 +0.000" in rows
    assert "_code 3.000 → 1.500 3.500 → 1.750 +0.250" in rows
    assert "mean 2.500 → 1.250 2.750 → 1.375 +0.125" in rows


def test_mixture_table_shows_counts_drops_and_shares(html: str) -> None:
    rows = table_rows(html)
    drops = "3 too_long 2 duplicate 1"
    shares = "4 50.0 % 300 75.0 % 100 62.5 %"
    assert f"chat 1,008 {drops} 1 4 1.00 / 1 {shares}" in rows
    assert "_code 5 0 1 4 1.00 / 1 4 50.0 % 100 25.0 % 60 37.5 %" in rows
    assert "total 1,013 3 2 8 8 400 160" in rows
    assert "12.50 % of instructions moved" in html
    assert "width: 62.5%" in html


def test_charts_show_every_domain_with_data_in_its_own_colour(html: str) -> None:
    training, held_out, rate, throughput = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert ">chat</text>" in training
    assert ">_code</text>" not in training, "null at every step: no curve"
    assert ">chat</text>" in held_out
    assert ">_code</text>" in held_out
    curve = rf'stroke: {PALETTE[1]}; stroke-width: [\d.]+; stroke-linecap: square"'
    dashed = rf"stroke-dasharray: [^;]+; stroke-dashoffset: 0; stroke: {PALETTE[1]}"
    assert len(re.findall(curve, held_out)) == 2, "the curve and its legend"
    assert re.search(dashed, held_out), "the default prompt is dashed"
    for label in ("learning rate", "gradient norm (L2)", "step"):
        assert f">{label}</text>" in rate
    for label in ("tokens/s", "fill (%)", "step"):
        assert f">{label}</text>" in throughput
    assert f'<i class="swatch" style="background: {PALETTE[1]}"></i>_code' in html


def test_the_time_of_the_run_is_shown_by_what_it_went_to(tmp_path: Path, html: str) -> None:
    times = {"time/step": 5400.0, "time/compile": 900.0, "time/lost": 900.0, "goodput": 0.75}
    page = report(write_run(tmp_path / "run", metrics=[*METRICS, {"step": 4, **times}]))
    assert cards(page)["goodput"] == "75.00 %"
    rows = table_rows(page)
    assert "step training steps 1.500 75.0 %" in rows
    assert "compile compiling programs 0.250 12.5 %" in rows
    assert "lost work that a restart repeats 0.250 12.5 %" in rows
    assert "Where the time went" not in html  # an older run, whose records have no times


def test_utilisation_and_memory_are_shown_where_the_devices_have_them(
    tmp_path: Path, html: str
) -> None:
    of_devices = [
        {"mfu": 0.30, "mfu_full_causal": 0.35, "peak_device_memory_bytes": 3 << 29},
        {"mfu": 0.40, "mfu_full_causal": 0.45, "peak_device_memory_bytes": 2 << 30},
    ]
    lines = [training_line(n + 1, 2.0, 100.0) | figures for n, figures in enumerate(of_devices)]
    page = report(write_run(tmp_path / "run", metrics=lines))
    assert cards(page)["median MFU"] == "35.00 %"
    assert cards(page)["peak device memory"] == "2.00 GiB"
    [chart] = re.findall(r"<svg[^>]*Utilisation of the devices by step.*?</svg>", page, re.DOTALL)
    assert ">useful</text>" in chart
    assert ">full causal rows</text>" in chart
    for of_none in ("median MFU", "peak device memory", "Utilisation"):
        assert of_none not in html


def test_scores_of_benchmarks_are_a_chart_of_their_own(tmp_path: Path, html: str) -> None:
    scored = [{"step": n, "eval/gsm8k/score": 10.0 * n} for n in range(3)]
    page = report(write_run(tmp_path / "run", metrics=[*METRICS, *scored]))
    assert 'aria-label="Benchmarks by step"' in page
    assert ">gsm8k<" in page
    assert "Benchmarks" not in html  # a run without benchmarks


def test_text_of_users_is_escaped_and_keeps_its_white_space(html: str) -> None:
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "\n  def f(x):\n    <script>alert(1)</script>" in page.text
    assert "Reverse <a> list & return it." in page.text
    assert "You write a < b && $x^" in page.text, "the folded configuration"


def test_name_of_a_domain_is_escaped_and_no_formula(tmp_path: Path, html: str) -> None:
    run_dir = write_run(tmp_path / "run")
    for path in run_dir.iterdir():
        path.write_text(path.read_text().replace("_code", "<u>$x^$"))
    page = Page(report(run_dir))
    assert "u" not in {tag for tag, _ in page.tags}
    assert page.text.count("<u>$x^$") == Page(html).text.count("_code")


def test_sample_answers_are_those_of_the_first_and_the_last_step(html: str) -> None:
    for answer in ("before, own", "before, default", "after, default"):
        assert answer in html
    assert "on the way" not in html


def test_page_loads_nothing_from_elsewhere(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    references = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert references
    assert all(value.startswith("#") for value in references)
    assert not re.search(r"https?://|@import|url\((?!#)", html)


def test_references_of_the_charts_name_one_element_each(html: str) -> None:
    ids = Counter(attributes["id"] for _, attributes in Page(html).tags if "id" in attributes)
    assert set(ids.values()) == {1}
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', html)) <= set(ids)


def test_same_files_give_the_same_bytes(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    first = write_report(run_dir).read_bytes()
    assert write_report(run_dir) == run_dir / "report.html"
    assert (run_dir / "report.html").read_bytes() == first


def test_report_is_replaced_whole(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    files = {path.name for path in run_dir.iterdir()}
    first = report(run_dir)
    with open(run_dir / "report.html", encoding="utf-8") as reader:
        (run_dir / "samples.jsonl").write_text("")
        assert report(run_dir) != first
        assert reader.read() == first
    assert {path.name for path in run_dir.iterdir()} == files | {"report.html"}


def test_sections_without_data_are_left_out(tmp_path: Path, html: str) -> None:
    sections = [
        "Held-out loss, first → last",
        "Training loss",
        "Held-out loss",
        "Learning rate and gradient norm",
        "Throughput and fill",
        "Mixture of one epoch",
        "Sample answers",
    ]
    assert Page(html).headings == sections
    untrained = write_run(tmp_path / "a", metrics=[FIRST_EVAL], mixture={}, samples=[])
    assert Page(report(untrained)).headings == [sections[0], sections[2]]
    undefined = [training_line(1, None, 100.0)]
    skipped = write_run(tmp_path / "b", metrics=undefined, samples=[])
    assert Page(report(skipped)).headings == sections[3:6]
    planned = write_run(tmp_path / "c", metrics=[], samples=[])
    assert Page(report(planned)).headings == [sections[5]]


def test_value_that_is_not_finite_counts_as_undefined(tmp_path: Path) -> None:
    metrics = [*METRICS, training_line(4, float("nan"), float("inf"))]
    figures = cards(report(write_run(tmp_path / "run", metrics=metrics)))
    assert figures["training loss"] == "3.000 → 1.250"
    assert figures["median tokens/s"] == "300"


def test_null_in_the_mixture_is_shown_as_a_dash(tmp_path: Path) -> None:
    mixture = MIXTURE | {"moved_share": None, "domains_per_row": None}
    assert "– of instructions moved" in report(write_run(tmp_path / "run", mixture=mixture))


def test_torn_line_is_left_out_and_counted(tmp_path: Path, html: str) -> None:
    run_dir = write_run(tmp_path / "run")
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "token_lo')
    torn = report(run_dir)
    assert "1 unreadable line of" in torn
    assert "unreadable" not in html
    assert cards(torn) == cards(html)


def test_long_curve_is_drawn_through_means_of_neighbours() -> None:
    curve = [(step, float(step % 2)) for step in range(2 * CHART_POINTS)]
    last_steps = range(1, 2 * CHART_POINTS, 2)
    assert thin(curve) == [(step, 0.5) for step in last_steps]
    assert thin(curve, max) == [(step, 1.0) for step in last_steps]
    assert thin(curve[:CHART_POINTS]) == curve[:CHART_POINTS]
    assert thin([]) == []


def test_directory_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.yaml; name the directory"):
        write_report(tmp_path)


def test_damaged_mixture_is_refused_in_one_line(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run")
    (run_dir / "mixture.json").write_text('{"fill": 0.9')
    with pytest.raises(UserError, match=r"mixture\.json is damaged") as refusal:
        write_report(run_dir)
    assert "\n" not in str(refusal.value)
