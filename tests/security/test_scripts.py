"""What a model, a judge or a stranger wrote is text, in every page, every card and a real browser."""

import json
import re
import shutil
from pathlib import Path

import msgspec
import pytest
from starlette.testclient import TestClient

from prefopt.data.dataset_card import dataset_card, inert
from prefopt.evaluation.dashboard import dashboard
from prefopt.evaluation.eval_report import EvalReport, report_html, report_markdown, write_report
from prefopt.evaluation.history import History
from prefopt.judges.agreement import measure_agreement
from prefopt.judges.calibrate import CalibrationReport
from prefopt.judges.label_report import label_report
from prefopt.judges.rubric import Rubric
from prefopt.preferences import build_preferences
from prefopt.serving.model_card import Provenance, model_card
from prefopt.types import Candidate, Comparison, JudgedComparison, Prompt, Verdict

KEPT = Path(__file__).parents[1] / "evaluation" / "data" / "eval_report_0.1.json"
RUN = "window.ran = 1"
PAYLOADS = (
    f"<script>{RUN}</script>",
    f"\"'><img src=x onerror='{RUN}'>",
    f"' autofocus onfocus='{RUN}' x='",
    f"</title></style></textarea><svg onload='{RUN}'>",
    f"--><script>{RUN}</script><!--",
    f"</svg><script>{RUN}</script>",
    f"javascript:{RUN}",
    f"[x](javascript:{RUN}) ![x](x' onerror='{RUN})",
    f"`</code><script>{RUN}</script>`",
    f"```\n</pre><script>{RUN}</script>\n```",
    f"&lt;script&gt;{RUN}&lt;/script&gt; &#60;script&#62;",
    "{{ 7 * 7 }}{% raw %}${7*7} $x^{$ \\frac{",
    f"<iframe srcdoc='<script>parent.ran = 1</script>'></iframe>\x00\x0b\u2028\u202e<b {RUN}>",
    f"| a | <details open ontoggle='{RUN}'> |\n# <object data=x>",
)


def report_with(text):
    """An evaluation's report in which every free text, and every free name, is `text`."""
    raw = json.loads(KEPT.read_text())
    raw["answers"] = raw["answers"][:3]

    def put(node, key, value):
        before, node[key] = node[key], value
        try:
            msgspec.json.decode(json.dumps(raw), type=EvalReport)
        except msgspec.ValidationError:
            node[key] = before

    def walk(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            if isinstance(node[key], str) and key not in ("schema", "prompt_id", "created_at"):
                put(node, key, text)
            elif isinstance(node[key], dict | list):
                walk(node[key])

    walk(raw)
    raw["details"] = {text: text}
    raw["created_with"] = {text: text}
    raw["labels"]["left_out"] = {text: 3}
    raw["win_rate"]["by_category"] = {
        text: next(iter(raw["win_rate"]["by_category"].values()), None) or raw["win_rate"],
        "other": next(iter(raw["win_rate"]["by_category"].values()), None) or raw["win_rate"],
    }
    raw["perplexity_text"] = text
    try:
        return msgspec.json.decode(json.dumps(raw), type=EvalReport)
    except msgspec.ValidationError:
        raw["win_rate"]["by_category"] = {}
        return msgspec.json.decode(json.dumps(raw), type=EvalReport)


def judged_with(text):
    items = []
    for i in range(4):
        prompt = Prompt.from_text(f"{text} {i}", category=text)
        a, b = (Candidate(prompt=prompt, text=f"{text} {x}", model=f"{text} {x}") for x in "ab")
        forward = Verdict(judge=text, preferred="a", strength=1, rationale=text, reply=text)
        failed = Verdict(judge=text, failure="refused", rationale=text, shown_first="b")
        backward = failed if i == 3 else msgspec.structs.replace(forward, shown_first="b")
        comparison = Comparison(a=a, b=b)
        items.append(JudgedComparison(comparison=comparison, forward=forward, backward=backward))
    return items


def pages(text, folder):
    """Every page of HTML that prefopt makes, by name."""
    judged = judged_with(text)
    rubric = Rubric(name=text, text=text)
    labels = label_report(
        judged, judge=text, rubric=rubric, preferences=build_preferences(judged), created_at=text
    )
    agreement = measure_agreement(judged, ["a", "b", "tie", "a"], name=text)
    calibration = CalibrationReport(
        judge=text, rubric=text, sets=(agreement,), overall=agreement, calibration=None, bins=(),
        created_at=text,
    )  # fmt: skip
    report = report_with(text)
    found = {
        "report": report_html(report),
        "labels": labels.to_html(),
        "calibration": calibration.to_html(),
    }
    names = ("first", "second")
    with History(folder / "history.sqlite") as history:
        for number, name in enumerate(names):
            write_report(msgspec.structs.replace(report, seeds={"x": number}), folder / name)
            history.add(folder / name, series=text)
        client = TestClient(dashboard(history, hosts=("testserver",)))
        for page in ("/", "/evaluations/1", "/evaluations/1/pairs/1", "/changes/1/2", "/nothing"):
            found[page] = client.get(page, params={"text": text[:40]} if page != "/" else {}).text
    return found


def cards(text):
    """Every card of Markdown that prefopt makes, by name."""
    judged = judged_with(text)
    groups = build_preferences(judged).groups
    rubric = Rubric(name=text, text=text)
    provenance = Provenance(
        method=text, base_model=text, prompts=text, answered_by={text: 3}, judge=text, rubric=rubric,
        labels=label_report(judged, judge=text, rubric=rubric, preferences=build_preferences(judged),
                            created_at=text),
        left_out={text: 1}, settings={"dpo": {text: [text, {text: text}]}}, report=report_with(text),
        versions={text: text}, n_pairs=3, spent_usd=1.0,
    )  # fmt: skip
    return {
        "model": model_card(provenance, "o/n", kind="model", base_model=None, license=text),
        "dataset": dataset_card(groups, judge=text, source=text),
        "report": report_markdown(report_with(text)),
    }


def without_code(markdown):
    return re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(
    "text", [PAYLOADS[0], PAYLOADS[7], *(pytest.param(p, marks=pytest.mark.slow) for p in PAYLOADS)]
)
def test_cards_hold_no_html_and_no_link_of_others(text):
    for name, card in cards(text).items():
        body = without_code(card.partition("\n---\n")[2] if card.startswith("---\n") else card)
        tags = set(re.findall(r"(?<!\\)<[^>]{0,80}", body))
        assert tags <= {"<details", "<summary", "</summary", "</details"}, (name, tags)
        links = re.findall(r"(?<!\\)\]\((?!https://|report\.png)[^)]*", body)
        assert not links, (name, links)


def test_inert_text_still_reads_as_it_is():
    assert inert("rules:house_style, 2 & more") == "rules:house_style, 2 & more"
    assert inert({"a": ("<b>", [1, "[x]"])}) == {"a": ("&lt;b>", [1, "\\[x\\]"])}


@pytest.mark.slow
@pytest.mark.enable_socket
def test_no_page_runs_what_others_wrote_even_without_its_own_protection(tmp_path):
    """The pages' policy against scripts is taken out first, so that escaping alone has to hold."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs prefopt[browser]")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here")
    html = {}
    for number, text in enumerate(PAYLOADS):
        folder = tmp_path / str(number)
        folder.mkdir()
        html |= {(number, name): page for name, page in pages(text, folder).items()}
    markdown_it = pytest.importorskip("markdown_it", reason="needs pip install markdown-it-py")
    markdown = markdown_it.MarkdownIt("commonmark", {"html": True})
    for number, text in enumerate(PAYLOADS):
        for name, card in cards(text).items():
            html[number, f"card of the {name}"] = markdown.render(card.rpartition("\n---\n")[2])
    html[-1, "control"] = f"<body><img src=x onerror='{RUN}'></body>"
    ran, asked = set(), []
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        for place, text in html.items():
            text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
            asked.clear()
            page.set_content(text)
            scripts = page.locator("script, iframe, object, embed, [onerror], [onload], [onfocus]")
            scripts = scripts.count() + page.locator("[ontoggle], a[href^='javascript:' i]").count()
            loaded = [url for url in asked if not url.startswith(("data:", "about:"))]
            if (
                page.evaluate("window.ran")
                or scripts
                or (loaded and "report.png" not in str(loaded))
            ):
                ran.add(place)
        browser.close()
    assert ran == {(-1, "control")}
