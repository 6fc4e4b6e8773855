"""The playground in a real Chromium against the really started demo server: what a person does with it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.server.process import ServerProcess
from tests.server.test_readme import run

api: Any = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the dev extra has it)")
axe: Any = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
KEY = "a kéy of this test"
NARROW, WIDE = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def demo() -> Iterator[ServerProcess]:
    with ServerProcess("--max-output-tokens", "200000") as process:
        yield process


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@dataclass
class Page:
    """The open page. `complaints`: what the console showed as an error; `urls`: everything it asked for."""

    page: Any
    server: ServerProcess
    complaints: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.urls.append(request.url))

    def _hear(self, message: Any) -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def open(self) -> Page:
        self.page.goto(self.server.rest_url)
        self.see("flan-demo · torch", "#model")
        return self

    def pane(self, letter: str = "A") -> Any:
        return self.page.get_by_role("region", name=f"Pane {letter}", exact=True)

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=False).click()

    def settings(self, letter: str = "A", **values: str) -> None:
        self.pane(letter).locator(".settings").evaluate("details => { details.open = true }")
        for name, value in values.items():
            self.pane(letter).locator(f"[name={name}]").fill(value)

    def open_all(self) -> None:
        self.page.locator("details").evaluate_all("all => all.forEach(details => { details.open = true })")

    def run(self) -> None:
        self.click("Run")
        self.until_done()

    def until_done(self) -> None:
        self.see("", "#stop:disabled")
        api.expect(self.page.locator("[data-stat=finish]", has_text="running")).to_have_count(0, timeout=30_000)

    def see(self, text: str | re.Pattern[str], selector: str) -> None:
        api.expect(self.page.locator(selector).first).to_contain_text(text, timeout=30_000)

    def stat(self, name: str, letter: str = "A") -> str:
        text: str = self.pane(letter).locator(f"[data-stat={name}]").inner_text()
        return text

    def code(self, language: str) -> str:
        pane = self.pane()
        pane.locator(".code").evaluate("details => { details.open = true }")
        pane.get_by_role("radio", name=language).check(force=True)
        pane.get_by_role("button", name="Copy").click()
        api.expect(pane.get_by_role("button", name="Copied")).to_be_visible()
        text: str = self.page.evaluate("() => navigator.clipboard.readText()")
        return text


@pytest.fixture
def make_page(browser: Any) -> Iterator[Any]:
    """Makes pages; at the end none may have complained, but of refusals that the test names, or asked elsewhere."""
    made: list[tuple[Page, Any, tuple[int, ...]]] = []

    def make(server: ServerProcess, refused: tuple[int, ...] = (), **options: Any) -> Page:
        context = browser.new_context(
            **{"viewport": WIDE, "permissions": ["clipboard-read", "clipboard-write"], **options}
        )
        page = Page(context.new_page(), server)
        made.append((page, context, refused))
        return page

    yield make
    for page, context, refused in made:
        context.close()
        unexpected = [
            line for line in page.complaints if not any(f"with a status of {status}" in line for status in refused)
        ]
        assert unexpected == []
        assert [url for url in page.urls if not url.startswith((page.server.rest_url, "data:"))] == []


@pytest.fixture
def page(make_page: Any, demo: ServerProcess) -> Page:
    opened: Page = make_page(demo).open()
    return opened


def outcomes(server: ServerProcess) -> dict[str, int]:
    """How often each outcome of /v1/generate was counted."""
    text = httpx.get(f"{server.rest_url}/metrics").text
    found = re.findall(r'^flan_requests_total\{.*outcome="(\w+)".*route="generate".*\} (\d+)', text, re.MULTILINE)
    counts: dict[str, int] = {}
    for outcome, count in found:
        counts[outcome] = counts.get(outcome, 0) + int(float(count))
    return counts


def until_cancelled(server: ServerProcess, count: int) -> None:
    """The server has noticed within two seconds, and nothing runs any more."""
    deadline = time.monotonic() + 2
    while outcomes(server).get("cancelled", 0) < count:
        assert time.monotonic() < deadline, "the server was not told"
        time.sleep(0.02)
    assert "\nflan_requests_running 0.0" in httpx.get(f"{server.rest_url}/metrics").text


def test_a_chain_shows_rationale_answer_and_measures(page: Page) -> None:
    page.run()
    page.see("la", ".final")
    page.see("The last letter of Paul is l. The last letter of Maria is a.", ".thinking")
    for _ in range(2):  # and they stay
        assert re.fullmatch(r"\d+ ms|\d+\.\d+ s", page.stat("ttft"))
        assert re.fullmatch(r"[\d.]+ tok/s", page.stat("rate"))
        assert (page.stat("finish"), page.stat("exemplars")) == ("stop", "none")
        assert int(page.stat("in")) > 10
        assert int(page.stat("out")) > 15
        page.page.wait_for_timeout(300)
    page.see(re.compile(r"queue .*, first token .*, whole .* · req-[0-9a-f]{24}"), ".served")
    page.see("Pane A: la.", "#announcer")


@pytest.mark.parametrize(
    ("example", "answer", "exemplars"),
    [
        ("Sentiment", "positive", "none"),
        ("Question type", "person", "2 of 2"),
        ("Odd one out", "lemonade", "none"),
        ("Raw prompt", "4", "none"),
        ("Addition", "59", "none"),
        ("Coin flip", "no", "none"),
    ],
)
def test_the_examples(page: Page, example: str, answer: str, exemplars: str) -> None:
    page.click(example)
    page.run()
    shown = ".final" if example in {"Addition", "Coin flip"} else ".output .text"
    page.see(re.compile(rf"^{answer}$"), shown)
    assert page.stat("exemplars") == exemplars


def test_votes_are_bars(page: Page) -> None:
    page.click("Vote on a sum")
    page.run()
    page.see("57", ".final")
    tallies = page.page.locator(".votes .tally").all_inner_texts()
    assert sum(int(tally.removesuffix(" of 12")) for tally in tallies) == 12
    widths = [bar.evaluate("bar => getComputedStyle(bar, '::before').width") for bar in page.page.locator(".bar").all()]
    counts = [int(tally.split()[0]) for tally in tallies]
    assert float(widths[0][:-2]) / float(widths[-1][:-2]) == pytest.approx(counts[0] / counts[-1], rel=0.05)
    assert page.page.locator(".samples li").count() == 12


def test_several_outputs_and_the_rendered_prompt(page: Page) -> None:
    page.click("Sentiment")
    page.settings(n="3", temperature="0.5", seed="7")
    page.pane().get_by_label("Show the rendered prompt").check()
    page.run()
    assert page.page.locator(".texts li").count() == 3
    page.page.get_by_text("Rendered prompt", exact=True).click()
    page.see("I loved the story, it was charming.", ".prompt .text")
    page.see("temperature 0.5 · seed 7 · 3 outputs · debug", ".settings-now")


def test_two_panes_run_the_same_task(page: Page) -> None:
    page.click("Coin flip")
    page.click("Compare")
    assert page.pane("B").get_by_role("radio", name="Instruction").is_checked()
    page.run()
    assert page.pane("A").locator(".final").inner_text() == "no"
    assert page.pane("B").locator(".text").inner_text() in {"yes", "no"}
    assert int(page.stat("out", "B")) < int(page.stat("out", "A"))
    page.click("Compare")
    api.expect(page.pane("B")).to_have_count(0)


def test_exemplars_are_added_moved_and_removed(page: Page) -> None:
    page.click("Question type")
    page.click("Add an exemplar")
    third = page.page.get_by_role("listitem", name="Exemplar 3")
    api.expect(third.get_by_label("Input")).to_be_focused()
    third.get_by_label("Input").fill("Why did it rain?")
    third.get_by_label("Output").fill("reason")
    page.click("Move Exemplar 3 up")
    page.click("Remove Exemplar 1")
    code = page.code("curl")
    body = json.loads(code[code.index("{") : code.rindex("}") + 1])
    assert [exemplar["output"] for exemplar in body["exemplars"]] == ["reason", "time"]
    page.see("2", "#exemplar-count")
    page.pane().get_by_role("radio", name="Instruction").check(force=True)
    api.expect(page.page.locator(".exemplars")).to_have_class(re.compile("unused"))
    page.pane().get_by_role("radio", name="Few-shot").check(force=True)
    page.run()
    assert page.stat("exemplars") == "2 of 2"


BELOW = """selectors => {
  const [above, below] = selectors.map(selector => document.querySelector(selector).getBoundingClientRect());
  return below.top - above.bottom;
}"""


def test_an_error_names_its_field(make_page: Any, demo: ServerProcess) -> None:
    page = make_page(demo, refused=(400,)).open()
    page.settings(temperature="3")
    page.run()
    page.see("Temperature: temperature must be in [0, 2], not 3", "[role=alert]")
    temperature = page.pane().locator("[name=temperature]")
    api.expect(temperature).to_be_focused()
    assert temperature.get_attribute("aria-invalid") == "true"
    assert page.stat("finish") == "error"
    api.expect(page.page.locator("[role=alert]:visible")).to_be_in_viewport()
    gap = page.page.evaluate(BELOW, ["[name=temperature]", "[role=alert]:not([hidden])"])
    assert 0 <= gap < 40, "the message stands at its field"
    temperature.fill("0.5")
    page.page.get_by_label("Instruction", exact=True).first.fill(" ")
    page.run()
    page.see("Instruction: instruction must not be blank", "[role=alert]")
    api.expect(page.page.locator("#instruction")).to_be_focused()
    api.expect(page.page.locator("#task [role=alert]")).to_be_in_viewport()
    page.page.locator("#instruction").fill("Take the last letters of Paul Maria and join them.")
    page.run()
    api.expect(page.page.locator("[role=alert]:visible")).to_have_count(0)
    assert temperature.get_attribute("aria-invalid") is None


@pytest.mark.parametrize("how", ["button", "escape", "leaving"])
def test_stop_reaches_the_server(page: Page, demo: ServerProcess, how: str) -> None:
    before = outcomes(demo).get("cancelled", 0)
    page.settings(min_tokens="150000", max_tokens="150000")
    page.click("Run")
    page.see(re.compile("tok/s"), "[data-stat=rate]")
    api.expect(page.page.locator("#stop")).to_be_enabled()
    if how == "leaving":
        page.page.goto("about:blank")
        until_cancelled(demo, before + 1)
        return
    if how == "button":
        page.click("Stop")
    else:
        page.page.keyboard.press("Escape")
    page.see("stopped", "[data-stat=finish]")
    until_cancelled(demo, before + 1)
    assert re.fullmatch(r"\d+ ms|\d+\.\d+ s", page.stat("ttft"))
    assert page.stat("rate").endswith("tok/s")
    assert int(page.stat("out").removeprefix("~")) > 1
    page.see("Pane A: stopped.", "#announcer")
    page.settings(min_tokens="", max_tokens="")
    page.run()
    assert page.stat("finish") == "stop"


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_a_long_stream_hides_neither_the_measures_nor_stop(
    make_page: Any, demo: ServerProcess, viewport: dict[str, int]
) -> None:
    before = outcomes(demo).get("cancelled", 0)
    page = make_page(demo, viewport=viewport).open()
    page.click("Sentiment")
    page.settings(min_tokens="150000", max_tokens="150000")
    page.pane().locator(".settings").evaluate("details => { details.open = false }")
    page.click("Run")
    output = page.pane().locator(".output")
    page.page.wait_for_function(
        "() => document.querySelector('.output').offsetHeight > 2 * innerHeight", timeout=60_000
    )
    output.evaluate("output => window.scrollTo(0, scrollY + output.getBoundingClientRect().top + innerHeight / 2)")
    for name in ("ttft", "rate", "out", "finish"):
        api.expect(page.pane().locator(f"[data-stat={name}]")).to_be_in_viewport()
    api.expect(page.page.locator("#stop")).to_be_in_viewport()
    page.page.mouse.click(*_middle(page.page.locator("#stop").bounding_box()))  # and nothing lies over it
    page.see("stopped", "[data-stat=finish]")
    until_cancelled(demo, before + 1)


def _middle(box: dict[str, float]) -> tuple[float, float]:
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_on_a_phone_a_run_comes_into_view(make_page: Any, demo: ServerProcess) -> None:
    page = make_page(demo, viewport=NARROW).open()
    page.page.evaluate("() => window.scrollTo(0, 0)")
    page.run()
    for selector in (".stats", ".final"):
        api.expect(page.pane().locator(selector)).to_be_in_viewport()


def test_closing_the_comparison_takes_its_error_along(make_page: Any, demo: ServerProcess) -> None:
    page = make_page(demo, refused=(400,)).open()
    page.click("Compare")
    page.page.locator("#instruction").fill(" ")
    page.run()
    api.expect(page.page.locator("[role=alert]:visible")).to_have_count(2)
    page.click("Compare")
    api.expect(page.page.locator("[role=alert]:visible")).to_have_count(1)


def test_running_again_replaces_the_run(page: Page, demo: ServerProcess) -> None:
    before = outcomes(demo).get("cancelled", 0)
    page.settings(min_tokens="150000", max_tokens="150000")
    page.click("Run")
    page.see(re.compile("tok/s"), "[data-stat=rate]")
    page.settings(min_tokens="", max_tokens="")
    page.run()
    page.see("la", ".final")
    assert page.stat("finish") == "stop"
    until_cancelled(demo, before + 1)


def test_everything_by_keyboard(page: Page) -> None:
    keyboard = page.page.keyboard
    keyboard.press("Tab")
    api.expect(page.page.get_by_text("Skip to the instruction")).to_be_focused()
    keyboard.press("Enter")
    keyboard.press("Control+a")
    keyboard.type("Take the last letters of Evan Don and join them.")
    keyboard.press("Control+Enter")
    page.until_done()
    page.see("nn", ".final")
    radio = page.pane().get_by_role("radio", name="Chain of thought")
    for _ in range(20):
        if radio.evaluate("radio => radio === document.activeElement"):
            break
        keyboard.press("Tab")
    api.expect(radio).to_be_focused()
    keyboard.press("ArrowLeft")
    keyboard.press("ArrowLeft")
    assert page.pane().get_by_role("radio", name="Instruction").is_checked()
    keyboard.press("Tab")  # the settings
    keyboard.press("Enter")
    keyboard.press("Tab")
    keyboard.press("ArrowRight")
    api.expect(page.pane().locator("[name=temperature]")).to_have_value("0.05")
    page.page.locator("#compare").focus()
    keyboard.press("Space")
    api.expect(page.pane("B")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(make_page: Any, demo: ServerProcess, scheme: str) -> None:
    page = make_page(demo, refused=(400,), color_scheme=scheme).open()
    page.click("Vote on a sum")
    page.click("Compare")
    page.run()
    page.open_all()
    page.click("Add an exemplar")
    page.settings("B", top_p="2")
    page.run()
    for look in ("as it is", "narrow"):
        if look == "narrow":
            page.page.set_viewport_size(NARROW)
        results = axe.Axe().run(page.page)
        assert results.violations_count == 0, results.generate_report()
        assert len(results.response["passes"]) > 20


def test_the_theme_follows_the_system_and_the_switch(make_page: Any, demo: ServerProcess) -> None:
    page = make_page(demo, color_scheme="dark").open()

    def background() -> str:
        text: str = page.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        return text

    dark = background()
    page.click("Theme: auto")
    light = background()
    assert light != dark
    page.click("Theme: light")
    assert background() == dark
    page.click("Theme: dark")
    page.page.emulate_media(color_scheme="light")
    assert background() == light


def test_nothing_overflows_on_a_phone(make_page: Any, demo: ServerProcess) -> None:
    page = make_page(demo, viewport=NARROW).open()
    page.click("Vote on a sum")
    page.click("Compare")
    page.run()
    page.open_all()
    page.click("Add an exemplar")
    assert page.page.evaluate("() => document.documentElement.scrollWidth") == NARROW["width"]


HARD = 'It\'s "so" $HOME `date` \\n\n2 + 2; é 😀 <b>'


def test_the_copied_curl_command_runs(page: Page) -> None:
    page.pane().get_by_role("radio", name="Raw").check(force=True)
    page.page.locator("#instruction").fill(HARD)
    page.settings(max_tokens="5")
    page.pane().get_by_label("Show the rendered prompt").check()
    frames = [line.removeprefix("data: ") for line in run(page.code("curl")).splitlines() if line.startswith("data: ")]
    assert frames[-1] == "[DONE]"
    assert json.loads(frames[-2])["prompt"] == HARD
    page.run()
    text = "".join(json.loads(frame).get("text", "") for frame in frames[:-1])
    assert page.page.locator(".output .text").first.inner_text() == (text if text else "empty text")


@pytest.mark.parametrize("example", ["Question type", "Coin flip", "Vote on a sum"])
def test_the_copied_python_and_grpc_run(page: Page, demo: ServerProcess, tmp_path: Path, example: str) -> None:
    page.click(example)
    page.run()
    shown = page.page.locator(".final, .output .text").first.inner_text()
    script = tmp_path / "request.py"
    script.write_text(page.code("Python"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=60, env={**os.environ}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
    command = page.code("gRPC")
    assert "127.0.0.1:GRPC_PORT" in command
    answer = run(command.replace("127.0.0.1:GRPC_PORT", demo.grpc_target))
    assert f'"{shown}"' in answer


def test_a_key_is_kept_in_memory_only(make_page: Any) -> None:
    """The page opens without a key, as a browser cannot send one; what it then asks the server needs it."""
    with ServerProcess("--api-key", "another", "--api-key", KEY) as server:
        page = make_page(server, refused=(401,))
        page.page.goto(server.rest_url)
        page.see("This server needs a key", "#model")
        page.run()
        page.see("API key: a valid API key is needed", "[role=alert]")
        assert page.page.get_by_label("API key").get_attribute("aria-invalid") == "true"
        assert axe.Axe().run(page.page).violations_count == 0
        api.expect(page.page.get_by_label("API key")).to_be_focused()
        api.expect(page.page.get_by_role("link", name="API reference")).to_be_hidden()  # a link cannot send the key
        page.page.get_by_label("API key").fill("wrong")
        page.page.keyboard.press("Tab")
        page.see("The key is not valid", "#model")
        page.page.get_by_label("API key").fill(KEY)
        page.run()
        page.see("flan-demo · torch", "#model")
        page.see("la", ".final")
        assert page.page.get_by_label("API key").get_attribute("aria-invalid") is None
        assert page.page.get_by_label("API key").get_attribute("aria-describedby") == "key-hint"
        for language in ("curl", "Python", "gRPC"):
            code = page.code(language)
            assert KEY not in code
            assert "FLAN_KEY" in code
        os.environ["FLAN_KEY"] = KEY
        try:
            assert "[DONE]" in run(page.code("curl"))
            assert "la" in run(page.code("gRPC").replace("127.0.0.1:GRPC_PORT", server.grpc_target))
        finally:
            del os.environ["FLAN_KEY"]
        kept = page.page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie]")
        assert kept == [0, 0, ""]
        page.page.reload()
        assert page.page.get_by_label("API key").input_value() == ""
