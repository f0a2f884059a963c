"""`dotmoe report`: one page with everything in it, whose pictures show something and whose figures are those of the model."""

import base64
import html
import io
import re
import shutil
import subprocess

import pytest
import torch
from test_cli import call, convert_arguments, here, tokenizer  # noqa: F401 (fixtures)
from tiny import E, K, sparse_model, tokens
from transformers import AutoModelForCausalLM

import dotmoe_kernels as dk
from dotmoe_kernels import cli
from dotmoe_kernels.conversion import all_experts, count_parameters, load, load_tokens, measure, moe_blocks
from dotmoe_kernels.conversion.report import card_html, read_run
from dotmoe_kernels.evaluation import perplexity

pytest.importorskip("matplotlib", reason="the report draws with matplotlib, which is missing: pip install 'dotmoe_kernels[demo]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PICTURE = re.compile(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">')
TITLES = ["assignment", "affinity and plan", "weights", "load", "co-routing", "perplexity against active parameters"]


@pytest.fixture(scope="module")
def run(here, tokenizer, tmp_path_factory):  # noqa: F811
    """A model, and a run whose checkpoint is still there, as an interruption leaves it; the page of both."""
    folder = tmp_path_factory.mktemp("report")
    assert cli.main(convert_arguments(here, folder / "moe")) == 0
    dense = AutoModelForCausalLM.from_pretrained(here / "dense")
    data = load_tokens([str(here / "text.txt")], tokenizer, sequence_length=16)
    options = dk.AlignmentConfig(steps=3, batch_size=2)
    dk.convert(dense, dk.DotMoeConfig(num_experts=8, top_k=2), data=data, alignment=options, folder=folder / "kept.run")
    arguments = [*("report", folder / "moe", "--data", here / "held.txt"), *("--run-folder", folder / "kept.run")]
    arguments += ["--sequence-length", 16]
    assert cli.main([str(a) for a in arguments]) == 0
    return folder


@pytest.fixture(scope="module")
def page(run):
    return (run / "moe.html").read_text()


def test_every_picture_is_there_and_shows_something(page):
    from matplotlib.image import imread

    found = PICTURE.findall(page)
    assert [title for title, _ in found] == [*TITLES, "training curves of align"]
    for title, data in found:
        picture = imread(io.BytesIO(base64.b64decode(data)), format="png")
        assert min(picture.shape[:2]) > 100, title
        assert len(set(map(tuple, picture.reshape(-1, picture.shape[2])[::7].tolist()))) > 8, title


def test_nothing_comes_from_elsewhere(page):
    assert not re.search(r"<(script|link|iframe|object|embed)|@import|url\(", page)
    assert all(source.startswith("data:") for source in re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page))


def test_every_figure_of_the_card(run, page):
    card = (run / "moe" / "README.md").read_text()
    cells = [
        c.strip().replace("\\|", "|") for line in card.splitlines() if line.startswith("|") for c in re.split(r"(?<!\\)\|", line)
    ]
    shown = set(re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", page))
    assert {html.escape(cell) for cell in cells if cell and set(cell) != {"-"}} <= shown
    assert len(cells) > 40


def test_perplexities_are_those_of_the_model(run, page, here, tokenizer):  # noqa: F811
    model = load(run / "moe")
    held = load_tokens([str(here / "held.txt")], tokenizer, sequence_length=16)
    rows = re.findall(
        r"<tr><td>(K \d+|every expert \(\d+\))</td><td class=n>([\d,]+)</td><td class=n>[\d.]+%</td><td class=n>([\d.]+)", page
    )
    assert [label for label, _, _ in rows] == ["K 1", "K 2", "K 4", "every expert (8)"]
    for label, active, value in rows:
        k = int(re.search(r"\d+", label).group())
        if k == 8:
            with all_experts(model):
                expected = perplexity(model, held)
        else:
            for block in moe_blocks(model).values():
                block.gate.top_k = k
            expected = perplexity(model, held)
        assert float(value) == pytest.approx(expected, rel=1e-4)
        assert int(active.replace(",", "")) == count_parameters(model, dict.fromkeys(moe_blocks(model), float(k)))[1]


def test_without_text_the_perplexities_of_the_card(run, capsys, tmp_path):
    status, out, _ = call(capsys, "report", run / "moe", "--output", tmp_path / "page.html")
    assert (status, out) == (0, f"report: {tmp_path / 'page.html'}\n")
    page = (tmp_path / "page.html").read_text()
    assert "training curves of align" in page  # of moe.run, which lies beside it
    assert "no text was given (--data)" in page
    card = (run / "moe" / "README.md").read_text()
    for kind in ("dense", "sparse"):
        assert f"<td class=n>{re.search(kind + r' perplexity [|] ([^ ]+)', card).group(1)}</td>" in page


def test_pairs_are_counted_and_the_lift_has_mean_one():
    model, x = sparse_model(), tokens(4, 12)
    gates, seen = {name: block.gate for name, block in moe_blocks(model).items()}, {}
    handles = [g.register_forward_hook(lambda m, a, out, n=n: seen.update({n: out[2]})) for n, g in gates.items()]
    with measure.collect_pairs(model) as pairs, torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    for name, indices in seen.items():
        expected = torch.zeros(E, E)
        for row in indices.tolist():
            for a in row:
                for b in row:
                    expected[a, b] += 1
        assert torch.equal(pairs[name].float(), expected)
        assert float(pairs[name].diagonal().sum()) == K * x.numel()
        ratio, n = measure.lift(pairs[name]), pairs[name].diagonal()
        chance = n[:, None] * n[None, :]
        used = ~ratio.isnan()
        assert float((ratio * chance)[used].sum() / chance[used].sum()) == pytest.approx(1)
        assert bool(ratio.diagonal().isnan().all())


def test_k_is_as_before_the_measurement():
    model = sparse_model()
    measured = measure.measure(model, tokens(4, 12))
    assert {block.gate.top_k for block in moe_blocks(model).values()} == {K}
    assert [p.label for p in measured.points] == ["K 1", f"K {K}", "K 4", f"every expert ({E})"]


def test_the_affinity_of_a_checkpoint(run):
    found = read_run(run / "kept.run")
    assert list(found.affinity) == list(found.assignment) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    for plan in found.plan.values():
        assert plan.shape == (64, 8)
        assert torch.allclose(plan.sum(1), torch.ones(64), atol=1e-4)


def test_a_card_in_other_words_is_shown_as_text():
    shown = card_html("---\na: b\n---\n\n# T\n\n<b>bold</b>\n\n| a | b |\n|---|---|\n| x\\|y | <i> |\n\n```\n<code>\n```\n")
    assert "<b>" not in shown
    assert "&lt;b&gt;bold" in shown
    assert "<td>x|y</td><td>&lt;i&gt;</td>" in shown
    assert "<pre>&lt;code&gt;</pre>" in shown


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--output", "{run}/moe.html"], "--output is {run}/moe.html, which exists; allowed: a new file, or --overwrite"),
        (["--output", "{run}"], "--output is {run}, a folder"),
        (["--output", "{run}/none/page.html"], "--output is {run}/none/page.html, and {run}/none cannot be written to"),
        (["--output", "{run}/x.html", "--run-folder", "{run}/none"], "--run-folder is {run}/none, which is no folder"),
        (["--output", "{run}/x.html", "--run-folder", "{run}/moe"], "--run-folder is {run}/moe, without log.jsonl or checkpoints"),
        (["--output", "{run}/x.html", "--batch-size", "0"], "--batch-size is 0; allowed: at least 1"),
        (["--output", "{run}/x.html", "--data", "{run}/none.txt"], "--data is {run}/none.txt"),
    ],
)
def test_bad_input(run, capsys, extra, message):
    status, _, error = call(capsys, "report", run / "moe", *[part.format(run=run) for part in extra])
    assert status == 2
    assert error.count("\n") == 1
    assert message.format(run=run) in error
    assert not (run / "x.html").exists()


def test_a_dense_model_and_a_broken_log(run, here, capsys, tmp_path):  # noqa: F811
    status, _, error = call(capsys, "report", here / "dense", "--output", tmp_path / "page.html")
    assert status == 2
    assert "whose model_type is 'llama'" in error
    (tmp_path / "log.jsonl").write_text("{}\n[1]\n")
    status, _, error = call(capsys, "report", run / "moe", "--output", tmp_path / "page.html", "--run-folder", tmp_path)
    assert status == 2
    assert "log.jsonl is no log of a training" in error


def test_without_matplotlib(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    status, _, error = call(capsys, "report", run / "moe", "--output", tmp_path / "page.html")
    assert status == 2
    assert "matplotlib is missing; allowed: an environment with it" in error


# replaces the page's end: sizes of the pictures as the browser decoded them, and how many colours each has
_LOOK = """<script>
window.onload = () => {
  const found = [...document.images].map(image => {
    const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
    canvas.width = image.naturalWidth; canvas.height = image.naturalHeight; pen.drawImage(image, 0, 0);
    const pixels = new Uint32Array(pen.getImageData(0, 0, canvas.width, canvas.height).data.buffer);
    return [image.alt, image.complete, image.naturalWidth, image.width, image.height, new Set(pixels).size].join(";");
  });
  document.body.innerHTML = "<pre>FOUND " + found.join("|") + " END</pre>";
};
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, which is not installed")
def test_a_browser_shows_every_picture(page, tmp_path):
    (tmp_path / "page.html").write_text(page.replace("</body>", _LOOK))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--window-size=1250,4000"]
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    found = re.search(r"FOUND (.*) END", done.stdout)
    assert found, done.stderr[-2000:]
    pictures = [line.split(";") for line in html.unescape(found.group(1)).split("|")]
    assert [p[0] for p in pictures] == [*TITLES, "training curves of align"]
    for title, complete, natural, width, height, colours in pictures:
        assert complete == "true", title
        assert int(natural) > 300, title
        assert min(int(width), int(height)) > 100, title
        assert int(colours) > 8, title
