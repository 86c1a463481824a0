"""A chat template that loops or eats memory is stopped, and nothing else is."""

import resource
import threading
import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from mobilemoe.limits import limited


def render(template: str) -> None:
    render_jinja_template(conversations=[[{"role": "user", "content": "x"}]], chat_template=template)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MEMORY = "{{ 'a' * 10000000000 }}"
DOUBLING = "{% set x = namespace(s='a') %}{% for i in range(60) %}{% set x.s = x.s + x.s %}{% endfor %}"


@pytest.mark.parametrize("in_thread", [False, True])
@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP, "The template takes more than 0.3 seconds and was stopped"),
        (MEMORY, "more than 0.3 GB of memory"),
        (DOUBLING, "more than 0.3 GB of memory"),
    ],
)
def test_a_template_without_end_is_stopped(template, message, in_thread):
    found = []

    def run() -> None:
        seconds = 0.3 if template is LOOP else 60
        with pytest.raises(ValueError, match=message), limited("The template", seconds, 3 * 10**8):
            render(template)
        found.append(True)

    before = resource.getrlimit(resource.RLIMIT_AS)
    if in_thread:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        run()
    assert found == [True] and resource.getrlimit(resource.RLIMIT_AS) == before


def test_what_follows_is_not_stopped():
    for _ in range(20):
        with limited("The template", 0.5):
            pass
    # Longer than what any of them had.
    time.sleep(0.6)
    with pytest.raises(KeyError), limited("The template"):
        raise KeyError
