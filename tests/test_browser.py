"""The browser fixture: it notices errors, missing files and foreign hosts, and it passes a clean page."""

import pytest
from browser import serve

PAGE = """<!doctype html><html lang="en"><head><title>Test</title><link rel="icon" href="data:,">{head}</head>
<body><p id="text">{body}</p></body></html>"""


@pytest.fixture
def show(tmp_path, open_page):
    """`show(head, body)` opens a generated page that also has a script `worker.js`."""

    def show(head: str = "", body: str = "text"):
        (tmp_path / "index.html").write_text(PAGE.format(head=head, body=body))
        (tmp_path / "worker.js").write_text("fetch('from_worker.txt').then(() => postMessage('done'))")
        with serve(tmp_path) as address:
            found = open_page(address)
            found.page.wait_for_load_state("networkidle")
        return found

    return show


def test_a_clean_page_passes(show):
    found = show()
    assert found.page.locator("#text").inner_text() == "text"
    assert len(found.hosts()) == 1 and found.hosts().pop().startswith("127.0.0.1:")
    found.assert_no_errors()


@pytest.mark.parametrize(
    "head, reason",
    [
        ("<script>console.error('printed')</script>", "printed"),
        ("<script>throw new Error('thrown')</script>", "thrown"),
        ("<script>Promise.reject(new Error('rejected'))</script>", "rejected"),
        ("<script src='missing.js'></script>", "404"),
        ("<script>new Worker('worker.js')</script>", "from_worker.txt"),
        ("<meta http-equiv='Content-Security-Policy' content=\"script-src 'none'\"><script>1</script>", "Content Security Policy"),
    ],
)
def test_faults_of_a_page_are_noticed(show, head, reason):
    found = show(head)
    assert reason in str([*found.console_errors, *found.page_errors, *found.failed])
    with pytest.raises(AssertionError):
        found.assert_no_errors()


def test_requests_to_other_hosts_are_noticed(show):
    found = show("<script>fetch('http://127.0.0.2:9/pixel').catch(() => 0)</script>")
    assert "127.0.0.2:9" in found.hosts()
