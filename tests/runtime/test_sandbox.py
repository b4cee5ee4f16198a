"""Chat templates that attack: code, time, memory."""

import time
import tracemalloc

import jinja2
import pytest

from nybble.runtime import sandbox
from nybble.runtime.sandbox import LimitError, RefusedError, render


@pytest.mark.parametrize(
    ("source", "result"),
    [
        ("{{ 'a' ~ 1 ~ none }}", "a1None"),
        ("{% for i in range(3) %}{{ i }}{{ '' if loop.last else ',' }}{% endfor %}", "0,1,2"),
        ("{% for k, v in d.items() %}{{ k }}={{ v }}{% endfor %}", "x=1"),
        ("{{ d | tojson }}|{{ 'é<' | tojson }}", '{"x": 1}|"é<"'),
        ("{% set ns = namespace(n=0) %}{% for i in range(5) %}{% set ns.n = ns.n + i %}"
         "{% endfor %}{{ ns.n }}", "10"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}x{{ 1 }}{% endgeneration %}y", "x1y"),
        ("{% macro m(a) %}[{{ a }}]{% endmacro %}{{ m('q') }}", "[q]"),
        ("{{ '%s-%d' | format('a', 3) }}{{ '{:>3}'.format('b') }}", "a-3  b"),
        ("{{ ['b', 'a'] | sort | join('+') }}", "a+b"),
        ("{%- if true %}\n    x\n    {%- endif %}", "    x"),
        ("{{ 'ab' * 2 }}{{ 2 ** 10 }}", "abab1024"),
        ("{{ dict(a=1).a }}", "1"),
        ("{% for x in nothing %}{% else %}empty{% endfor %}", "empty"),
        ("{% for x in d.l recursive %}{{ x }}{% endfor %}", ""),
    ],
)  # fmt: skip
def test_ordinary_templates_work(source, result):
    assert render(source, {"d": {"x": 1}}) == result


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ ['{0.__class__}'] | map('format', 1) | list }}",
        "{% set f = '{0.__class__.__mro__}'.format %}{{ f(1) }}",
        "{{ messages.append(1) }}",
        "{% set _ = d.update({'y': 2}) %}",
        "{{ namespace(__class__=1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ raise_exception.__globals__ }}",
        "{{ 1 / 0 }}",
        "{{ missing.attribute.deep }}",
        "{% for %}",
        "{{ lipsum() }}",
    ],
)
def test_what_a_template_must_not_do_is_an_error(source):
    try:
        text = render(source, {"messages": [1], "d": {"x": 1}})
    except (jinja2.TemplateError, LimitError):
        return
    assert text == ""  # the sandbox may make a forbidden attribute undefined, which prints nothing


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * 'a' }}",
        "{{ [0] * 10000000000 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set ns = namespace(x='a') %}"
        "{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}"
        "{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}"
        "{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% endfor %}{{ ns.x | tojson }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(40) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}"
        "{% endset %}{% endfor %}",
        "{{ 'a' | center(10000000000) }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ 'a\n' | indent(10000000000) }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%*d' % (10000000000, 1) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 10000000000) }}",
        "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999) | replace('a', 'b' * 9999) }}",
        "{{ ('x' * 9999).join(['y'] * 9999) }}",
        "{{ (['y'] * 9999) | join('x' * 9999) }}",
        "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
        "{{ m(60) }}",
        "{{ range(99999) | map('upper') | map('lower') | list | length }}" * 200,
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for i in [1] %}" * 300 + "{% endfor %}" * 300,
        "x" * (sandbox.MAX_SOURCE + 1),
    ],
)
def test_time_and_memory_are_bounded(source, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)
    start = time.monotonic()
    tracemalloc.start()
    with pytest.raises((LimitError, jinja2.TemplateError)):
        render(source, {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert time.monotonic() - start < 10  # compiling long templates takes a while
    assert peak < 512 << 20


def test_a_template_may_refuse():
    with pytest.raises(RefusedError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", {})


def test_the_clock_of_a_template():
    assert render("{{ strftime_now('%Y') }}", {}) == time.strftime("%Y")
