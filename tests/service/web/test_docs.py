"""The description of the API in a browser."""

import json

import pytest
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, Field

from service import errors
from service.web.routes import router


class Thing(BaseModel):
    """A thing of two parts."""

    name: str = Field(description="what it is called")
    weights: list[float] = []


def described_service():
    api = APIRouter()

    @api.get("/things/{number}", tags=["things"], responses=errors.responses(errors.NotReadyError))
    async def thing(number: int, size: int = 7) -> Thing:
        """One thing, by its `number`.

        It costs <b>nothing</b>:

            curl http://127.0.0.1:8000/things/1
        """
        return Thing(name=str(number * size))

    app = FastAPI(title="t", version="1.2.3", docs_url=None, redoc_url=None)
    app.include_router(router)
    app.include_router(api)
    return app


@pytest.fixture
def page(browser, serve_app):
    browser.open(serve_app(described_service()) + "/docs")
    browser.wait_for("document.querySelector('.route')")
    return browser


def rows(page, heading):
    """Texts of the table below a heading."""
    return page.evaluate(
        f"""(() => {{
            const heading = [...document.querySelectorAll("h3")]
                .find((h) => h.textContent === {json.dumps(heading)});
            return [...heading.nextElementSibling.rows]
                .map((row) => [...row.cells].map((cell) => cell.textContent));
        }})()"""
    )


def test_it_opens_without_complaints_and_asks_nobody_else(page):
    assert page.complaints == []
    assert page.foreign_requests(page.evaluate("location.href")) == []
    assert page.text("#version") == "API 1.2.3"


def test_a_route_shows_its_options_answers_and_fields(page):
    assert page.text(".route h2") == "GET/things/{number}"
    assert rows(page, "Options") == [
        ["numberinteger; required; in the path", ""],
        ["sizeinteger; default 7", ""],
    ]
    assert ["503", "not_ready: " + errors.NotReadyError.__doc__] in rows(page, "Answers")
    assert "weightslist of number" in page.text(".route details")
    assert page.evaluate("document.querySelector('#contents a').hash") == "#get-things-number-"


def test_descriptions_are_text_and_never_markup(page):
    texts = page.evaluate(
        "[...document.querySelector('.route .text').children]"
        ".map((element) => [element.tagName, element.textContent])"
    )

    assert texts == [
        ["P", "One thing, by its number."],
        ["P", "It costs <b>nothing</b>:"],
        ["PRE", "curl http://127.0.0.1:8000/things/1"],
    ]


def test_routes_of_the_pages_themselves_are_not_described(page):
    paths = page.evaluate(
        "[...document.querySelectorAll('.route h2 code')].map((c) => c.textContent)"
    )

    assert paths == ["/things/{number}"]


def test_a_missing_description_is_said_to_be_missing(browser, serve_app):
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(router)
    browser.open(serve_app(app) + "/docs")

    browser.wait_for("document.querySelector('#status.error')")

    assert "404" in browser.text("#status")
