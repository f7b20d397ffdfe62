"""Swagger UI in a real browser: the page needs nothing from elsewhere, and its buttons work.

Debian's `chromium` and `chromedriver` are needed; the Makefile installs them. The browser may reach any address: what
it asks for is read from its own network log.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from tests.serving import RunningServer, start_server

TOKEN = "a-token-for-the-browser-1234"
ENDPOINT = "/get_embedding_vector_for_string/"
BROWSER_OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # the tests may run as root, where the browser's sandbox does not work
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1600",
)
WAIT_SECONDS = 20.0


def find_program(*names: str) -> str:
    """The first of the programs that is installed; without any the test fails and says what is missing."""
    found = next((path for name in names if (path := shutil.which(name))), None)
    assert found is not None, f"None of {', '.join(names)} is installed: apt-get install chromium chromium-driver"
    return found


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[webdriver.Chrome]:
    """A headless browser with an empty profile that logs what it asks the network for."""
    options = Options()
    options.binary_location = find_program("chromium", "chromium-browser", "google-chrome")
    for option in (*BROWSER_OPTIONS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    # A proxy of the environment is for neither the driver's commands nor this machine's own addresses.
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    service = Service(find_program("chromedriver"), env=environment)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with start_server(tmp_path_factory.mktemp("swagger")) as running:
        yield running


@pytest.fixture(scope="module")
def guarded_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with start_server(tmp_path_factory.mktemp("guarded_swagger"), {"SECURITY_TOKEN": TOKEN}) as running:
        yield running


def find(browser: webdriver.Chrome, selector: str) -> WebElement:
    """The first element that is shown, waited for."""

    def find_shown(driver: webdriver.Chrome) -> WebElement | Literal[False]:
        shown = [element for element in driver.find_elements(By.CSS_SELECTOR, selector) if element.is_displayed()]
        return shown[0] if shown else False

    waiting: WebDriverWait[webdriver.Chrome] = WebDriverWait(browser, WAIT_SECONDS)
    return waiting.until(find_shown, f"{selector} is not shown")


def open_endpoint(browser: webdriver.Chrome, url: str) -> str:
    """Load the page and unfold the embedding endpoint; the selector of its block."""
    browser.get(f"{url}/")
    block = f"div.opblock:has(span[data-path='{ENDPOINT}'])"
    find(browser, f"{block} button.opblock-summary-control").click()
    return block


def execute(browser: webdriver.Chrome, block: str, expected_status: str) -> str:
    """Press Execute and wait for this status; the body that the page shows."""
    button = find(browser, f"{block} button.execute")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", button)
    button.click()
    live = f"{block} .live-responses-table tbody"
    waiting: WebDriverWait[webdriver.Chrome] = WebDriverWait(browser, WAIT_SECONDS)
    waiting.until(
        lambda driver: find(driver, f"{live} .response-col_status").text.split()[:1] == [expected_status],
        f"no reply with status {expected_status}",
    )
    return find(browser, f"{live} .response-col_description pre").text


def requested_urls(browser: webdriver.Chrome) -> list[str]:
    """Everything that pages asked the network for, redirects included."""
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [
        message["params"]["request"]["url"] for message in messages if message["method"] == "Network.requestWillBeSent"
    ]


def check_that_nothing_left_the_host(browser: webdriver.Chrome, url: str) -> list[str]:
    """All requests went to the server; returns their paths."""
    asked = [urlsplit(address) for address in requested_urls(browser)]
    from_network = [address for address in asked if address.scheme not in ("data", "blob", "chrome", "about")]
    assert {f"{address.scheme}://{address.netloc}" for address in from_network} == {url}
    return [address.path for address in from_network]


def test_embedding_endpoint_shows_a_vector_and_no_request_leaves_the_host(
    browser: webdriver.Chrome, server: RunningServer
) -> None:
    """The page, its scripts, its style and its icon come from the server; Execute shows the example's vector."""
    block = open_endpoint(browser, server.url)
    assert "I feel extremely chilly" in str(find(browser, f"{block} textarea.body-param__text").get_attribute("value"))
    shown = json.loads(execute(browser, block, "200"))
    vector = np.array(shown["embedding"])
    assert vector.shape == (384,)
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)
    browser.save_screenshot(str(server.directory / "swagger.png"))
    paths = check_that_nothing_left_the_host(browser, server.url)
    assert {"/", "/openapi.json", "/static/swagger.js", ENDPOINT} <= set(paths)
    errors = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert errors == []


def test_token_is_asked_for_and_entered_on_the_page(browser: webdriver.Chrome, guarded_server: RunningServer) -> None:
    """Without it the endpoint shows 401; after Authorize it shows a vector."""
    block = open_endpoint(browser, guarded_server.url)
    assert json.loads(execute(browser, block, "401"))["code"] == "invalid_api_key"
    browser.execute_script("window.scrollTo(0, 0)")
    find(browser, ".auth-wrapper button.authorize").click()
    find(browser, ".modal-ux .auth-container input").send_keys(TOKEN)
    find(browser, ".modal-ux .auth-container button.authorize").click()
    browser.save_screenshot(str(guarded_server.directory / "authorize.png"))
    find(browser, ".modal-ux button.btn-done").click()
    assert len(json.loads(execute(browser, block, "200"))["embedding"]) == 384
    check_that_nothing_left_the_host(browser, guarded_server.url)
