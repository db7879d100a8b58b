"""Pages for people: what a phone needs, and that text cannot become markup."""

from octo_like.common import pages


def test_a_page_is_as_wide_as_the_screen_and_wide_tables_scroll_by_themselves():
    page = pages.html_document("a < b", [("Wide", pages.html_table([["dimension"] * 20, ["<x>"] * 20]))])
    assert '<meta name=viewport content="width=device-width, initial-scale=1">' in page
    for rule in (
        "table{border-collapse:collapse;display:block;overflow-x:auto",
        "pre{overflow-x:auto}",
        "img{max-width:100%}",
    ):
        assert rule in page
    assert "<title>a &lt; b</title>" in page and "<td>&lt;x&gt;</td>" in page and "<x>" not in page
