"""Oracle: a real browser uses the page, on a desk and on a phone."""

import json
import re
import shutil
import time
from dataclasses import replace

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

import onebit
from onebit.engine.engine import Engine
from onebit.llm import LLM
from onebit.serve.service import Options
from serve.running import running

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --window-size=1180,780""".split()
PATIENCE_S = 60

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="left out: the page in a browser (apt install chromium chromium-driver)"
)


class Page:
    """The page as its user sees it."""

    def __init__(self, driver, server):
        self.driver = driver
        self.server = server

    def open(self, path="", model="stories"):
        self.driver.get("about:blank")
        self.driver.get(f"{self.server.url}/{path}")
        self.wait(lambda: self.models)
        Select(self.one("#model")).select_by_visible_text(model)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.texts(selector)[0]

    def texts(self, selector):
        # In one go: the page may draw anew at any time.
        return self.run(f"[...document.querySelectorAll('{selector}')].map((e) => e.innerText.trim())")

    def run(self, script):
        return self.driver.execute_script(f"return {script}")

    @property
    def models(self):
        return self.texts("#model option")

    def set(self, **settings):
        self.run(f"localStorage.setItem('onebit.settings', '{json.dumps(settings)}')")

    def press(self, *keys):
        self.one("#prompt").send_keys(*keys)

    def click(self, words, within="#turns"):
        next(b for b in self.all(f"{within} button") if b.text == words).click()

    def say(self, text):
        self.press(text, Keys.ENTER)

    @property
    def is_writing(self):
        return self.one("#stop").is_displayed()

    def finish(self):
        self.wait(lambda: self.all(".answer[aria-busy=false]") and not self.is_writing)
        return self.texts(".answer .text")

    def wait(self, condition):
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, "it never came true"
            time.sleep(0.02)

    def emulate(self, **features):
        given = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": given})

    def resize(self, width, height, mobile=False):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    @property
    def complaints(self):
        """What the console says; a request that the policy forbids is told there."""
        return [line["message"] for line in self.driver.get_log("browser")]

    @property
    def requests(self):
        messages = [json.loads(line["message"])["message"] for line in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if url.startswith(("http", "ws"))]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options, Service(DRIVER)) as driver:
        yield driver


@pytest.fixture(scope="module")
def models():
    """The model that ships, as it is and as one that talks: its turns are put one after the other."""
    stories = onebit.load(threads=1)
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return {"stories": stories, "talker": LLM(replace(stories.checkpoint, chat_template=template), threads=1)}


@pytest.fixture(scope="module")
def server(models, tmp_path_factory):
    log = tmp_path_factory.mktemp("serve") / "log.jsonl"
    with running(models, Options(cache_bytes=2**23), log) as server:
        yield server


@pytest.fixture
def page(driver, server):
    page = Page(driver, server)
    driver.get(server.url)
    page.run("localStorage.clear()")
    page.run("sessionStorage.clear()")
    page.resize(1180, 780)
    page.emulate(prefers_color_scheme="light")
    yield page
    assert page.complaints == []


def slow(monkeypatch, seconds=0.05):
    """Steps that take so long that a user can do something meanwhile."""
    step = Engine.step
    monkeypatch.setattr(Engine, "step", lambda engine: (time.sleep(seconds), step(engine))[1])


def test_a_story_is_streamed_and_is_the_one_of_the_engine(page, models, monkeypatch):
    slow(monkeypatch)
    page.open()
    page.set(temperature=0, max_tokens=20)
    page.say("Once upon a time")
    page.wait(lambda: len(page.texts(".answer .text")[0]) > len("Once upon a time") + 5)
    assert page.is_writing and page.one("#turns .answer").get_attribute("aria-busy") == "true"
    expected = models["stories"].generate("Once upon a time", temperature=0, max_tokens=20)
    assert page.finish() == ["Once upon a time" + expected.text]
    figures = page.text(".figures")
    assert figures.startswith("20 tokens · ") and "per second" in figures and "first after" in figures
    assert page.one("#status").get_attribute("textContent") == "Answer complete, 20 tokens."
    # The text ended at its limit: it can go on.
    page.click("Continue")
    page.wait(lambda: len(page.all(".answer")) == 2)
    more = models["stories"].generate("Once upon a time" + expected.text, temperature=0, max_tokens=20)
    assert page.finish()[1] == more.text.strip()


def test_stop_frees_the_server_and_regenerate_writes_anew(page, server, monkeypatch):
    slow(monkeypatch)
    page.open()
    page.set(max_tokens=400, seed=5)
    for stop in (lambda: page.one("#stop").click(), lambda: page.press(Keys.ESCAPE)):
        page.say("Once upon a time")
        page.wait(lambda: len(page.texts(".answer .text")[-1]) > 30)
        stop()
        page.finish()
        server.wait_for(lambda: server.figure("texts_running") == 0)
        assert (
            "stopped" in page.texts("#turns .figures")[-1] and "seed 5" in page.texts("#turns .figures")[-1]
        )
    monkeypatch.undo()
    first = page.finish()[-1]
    page.set(max_tokens=20, seed=5)
    page.all(".answer:last-child button")[1].click()
    page.wait(lambda: "seed 6" in "".join(page.texts("#turns .figures")))
    again = page.finish()[-1]
    assert again.startswith("Once upon a time") and again != first


def test_a_conversation_keeps_its_turns_and_can_be_edited(page, models):
    page.open(model="talker")
    page.set(temperature=0, max_tokens=8, system="One day")
    page.press("Tim saw", Keys.SHIFT + Keys.ENTER, Keys.NULL, "a dog.", Keys.ENTER)
    page.finish()
    page.say("Then he")
    page.wait(lambda: len(page.all(".answer")) == 2)
    first, second = page.finish()

    def answer(*messages):
        roles = ["system", *["user", "assistant"] * 3]
        said = [{"role": role, "content": text} for role, text in zip(roles, messages, strict=False)]
        return models["talker"].chat(said, temperature=0, max_tokens=8).text

    told = answer("One day", "Tim saw\na dog.")
    assert first == told.strip()
    assert second == answer("One day", "Tim saw\na dog.", told, "Then he").strip()
    assert page.texts(".user .text") == ["Tim saw\na dog.", "Then he"]
    page.run("document.querySelector('.user button').click()")
    assert page.one("#prompt").get_attribute("value") == "Tim saw\na dog."
    page.one("#prompt").clear()
    page.say("The cat")
    assert page.finish() == [answer("One day", "The cat").strip()]
    assert page.texts(".user .text") == ["The cat"]


def test_what_a_model_writes_stays_text(page):
    page.open()
    hostile = "a <img src=x onerror=alert(1)> `<b>x</b>`\n\n```html\n<script>alert(2)</script>\n```\n\nend"
    page.run(
        "import('/static/render.js').then(({ blocks }) => "
        f"document.querySelector('#turns').replaceChildren(...blocks({json.dumps(hostile)})))"
    )
    page.wait(lambda: page.all("#turns figure"))
    assert not page.all("#turns img, #turns b, #turns script")
    assert page.texts("#turns p") == ["a <img src=x onerror=alert(1)> <b>x</b>", "end"]
    assert page.texts("#turns pre code") == ["<script>alert(2)</script>"]
    assert page.run("document.querySelector('#turns').innerHTML.includes('&lt;script&gt;')")


def test_the_policy_forbids_other_places_and_inline_scripts(driver, page):
    page.open()
    page.run(
        "void (document.body.append(Object.assign(document.createElement('script'), {text: 'window.bad = 1'})))"
    )
    page.run("void fetch('http://127.0.0.2:9/').catch(() => 0)")
    seen = []
    page.wait(lambda: len(seen.extend(page.complaints) or seen) >= 2)
    assert all("Content Security Policy" in line for line in seen)
    assert page.run("window.bad") is None


def test_no_request_leaves_the_server(page, server):
    page.requests  # noqa: B018, empties the log
    page.open()
    page.say("Once")
    page.finish()
    page.one("#tab-dashboard").click()
    page.wait(lambda: "–" not in page.texts("[data-card=texts] output"))
    requests = page.requests
    assert any(url.endswith("/metrics") for url in requests)
    assert [url for url in requests if not url.startswith(server.url + "/")] == []


def test_settings_are_remembered_and_sent(page, models):
    page.open()
    page.one("#open-settings").click()
    page.one("#seed").send_keys("41")
    page.one("#max_tokens").clear()
    page.one("#max_tokens").send_keys("30")
    page.one("#temperature").send_keys(Keys.HOME)
    page.one("#repetition_penalty").send_keys(Keys.END)
    page.one("#seed").send_keys(Keys.ESCAPE)
    page.wait(lambda: not page.one("#settings").is_displayed())
    page.open()
    page.one("#open-settings").click()
    names = ("seed", "max_tokens", "temperature", "repetition_penalty", "top_k")
    values = [page.one(f"#{name}").get_attribute("value") for name in names]
    assert values == ["41", "30", "0", "1.5", "40"]
    page.one("#settings header button").click()
    prompt = "Once upon a time"
    page.say(prompt)
    expected, plain = (
        prompt
        + models["stories"].generate(prompt, max_tokens=30, temperature=0, repetition_penalty=penalty).text
        for penalty in (1.5, 1.0)
    )
    assert [text.split() for text in page.finish()] == [expected.split()] != [plain.split()]
    assert page.text(".figures").startswith("30 tokens") and "seed 41" in page.text(".figures")


def test_a_phone_shows_everything_without_scrolling_sideways(page):
    page.resize(390, 844, mobile=True)
    page.open()
    page.set(max_tokens=30)
    page.say("Once upon a time " + "w" * 200)
    page.finish()
    for tab in ("#tab-chat", "#tab-dashboard"):
        page.one(tab).click()
        assert page.run("document.documentElement.scrollWidth") == 390
        for control in ("#model", "#open-settings", "#theme", tab):
            box = page.one(control).rect
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] >= 24
    assert page.run("document.querySelector('.board').scrollWidth") <= 390


def test_dark_follows_the_system_until_it_is_switched(page):
    def is_dark():
        red = page.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0]")
        return int(red) < 100

    page.open()
    assert not is_dark()
    page.emulate(prefers_color_scheme="dark")
    assert is_dark()
    page.one("#theme").click()
    assert not is_dark()
    page.open()
    assert not is_dark()
    page.one("#theme").click()
    assert is_dark()


def test_the_dashboard_shows_what_the_metrics_say(page, server):
    page.open()
    page.set(max_tokens=40, seed=1)
    page.say("Once upon a time")
    page.finish()
    page.one("#tab-dashboard").click()
    page.wait(lambda: "intact" in page.text("[data-card=health]"))
    rows = page.texts("[data-card=health] tbody th")
    assert rows == ["stories", "talker"]
    assert page.texts(".verdict.bad") == []
    used = server.figure("kv_blocks_used")
    assert page.texts("[data-card=cache] dd")[0] == f"{used:.0f} blocks"
    assert "ok" in page.text("[data-card=errors]")
    # A later answer shows in the percentiles of the last minute.
    body = {"model": "stories", "prompt": "Once", "max_tokens": 30, "seed": 1}
    assert server.post("/v1/completions", body).status_code == 200
    page.wait(lambda: "–" not in page.texts("[data-card=first] output"))
    page.wait(lambda: page.all("[data-card=tokens] path.line"))
    # What layers see comes of steps that are looked at, and of texts that fill a block.
    server.service.served[0].runner.engine.probe_every = 5
    assert server.post("/v1/completions", body | {"max_tokens": 90, "ignore_eos": True}).status_code == 200
    page.wait(lambda: "bits" in page.text("[data-card=health] tbody tr"))
    cells = page.texts("[data-card=health] tbody tr:first-child td")[4:7]
    assert re.fullmatch(r"0\.[1-9] %\s+layer \d, (qkv|o|gate/up|down)", cells[0])
    assert re.fullmatch(r"\d\d %\s+layer \d, down", cells[1])
    assert re.fullmatch(r"[67]\.\d+ bits\s+layer \d, (keys|values)", cells[2])
    assert page.texts(".verdict.bad") == []
    # While nobody looks nothing is read.
    page.one("#tab-chat").click()
    page.requests  # noqa: B018, empties the log
    time.sleep(2.2)
    assert len([url for url in page.requests if url.endswith("/metrics")]) <= 1


def test_the_dashboard_judges_a_model_by_many_answers(page, server):
    page.open()
    page.one("#tab-dashboard").click()
    cell = "[data-card=health] tbody tr:last-child td:nth-of-type(3)"
    page.wait(lambda: page.texts(cell))
    body = {
        "model": "talker",
        "prompt": "Once",
        "max_tokens": 30,
        "ignore_eos": True,
        "logit_bias": {"13": 100},
    }
    for _ in range(19):
        assert server.post("/v1/completions", body).status_code == 200
    page.wait(lambda: "".join(page.texts(cell)).startswith("9"))
    assert page.texts(f"{cell} .verdict.bad") == []
    assert server.post("/v1/completions", body).status_code == 200
    page.wait(lambda: page.texts(f"{cell} .verdict.bad"))


def test_keys_of_the_keyboard_reach_everything(page):
    page.open()
    page.one("#tab-chat").send_keys(Keys.ARROW_RIGHT)
    assert page.one("#dashboard").is_displayed()
    assert page.run("document.activeElement.id") == "tab-dashboard"
    page.one("#tab-dashboard").send_keys(Keys.ARROW_LEFT)
    assert page.one("#chat").is_displayed()
    nameless = page.run(
        "[...document.querySelectorAll('button, input, select, textarea')].filter((e) => "
        "!(e.textContent.trim() || e.ariaLabel || e.labels?.length)).map((e) => e.id)"
    )
    assert nameless == []


def test_refusals_are_told_kindly(driver, models, page):
    options = Options(cache_bytes=2**23, api_keys=["secret"], max_num_seqs=1, max_queue=0)
    with running(models, options) as locked:
        there = Page(driver, locked)
        driver.get(locked.url)
        there.wait(lambda: there.one("#settings").is_displayed())
        assert "asks for an API key" in there.text("#settings-notice")
        there.one("#key").send_keys("secret", Keys.TAB)
        there.wait(lambda: there.models == ["stories", "talker"])
        there.one("#settings header button").click()
        with locked.service.served[0].runner.reserve(1):
            there.say("Once")
            there.wait(lambda: there.all(".answer .notice"))
            assert "no place is left" in there.text(".answer .notice")
        there.wait(lambda: there.one(".answer .notice button").is_enabled())
        there.one(".answer .notice button").click()
        assert there.finish()[0].startswith("Once")
        there.say("word " * 600)
        there.wait(lambda: there.all(".answer .notice"))
        assert "longer than the model can read" in there.text(".answer .notice")
    there.say("Once")
    there.wait(lambda: "does not answer" in "".join(there.texts(".answer .notice")))
    # The browser tells of every answer that is an error.
    assert all("Failed to load resource" in line for line in page.complaints)
