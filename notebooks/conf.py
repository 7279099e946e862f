"""The book: these notebooks as a static site, built from their saved outputs without a network.

`sphinx-build -W notebooks build/book` builds it and fails at a broken internal link; `sphinx-build -b linkcheck
notebooks build/links` asks the web for the others. Colab needs to know where the repository is: `repository` below is
the one place that says so.
"""

import json
import os
import shutil
import subprocess

project, author, copyright = "ringref", "the ringref maintainers", "the ringref maintainers, MIT licence"
extensions = ["myst_nb", "sphinx-mathjax-offline"]  # formulas are read without a network too
nb_execution_mode = "off"  # what is published is what was saved, and what pytest --nbval compares
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 2
html_theme = "sphinx_book_theme"
html_title = "ringref"
html_static_path = ["style"]
html_css_files = ["book.css"]
html_theme_options = {"use_download_button": True, "home_page_in_toc": True, "show_navbar_depth": 1}
linkcheck_timeout = 20


def repository():
    """The address that RINGREF_REPOSITORY names, else that of git's remote "origin"; "" if it is not on GitHub."""
    told = os.environ.get("RINGREF_REPOSITORY", "")
    if not told and shutil.which("git"):
        asked = ["git", "remote", "get-url", "origin"]
        told = subprocess.run(asked, cwd=os.path.dirname(__file__), capture_output=True, text=True).stdout
    address = told.strip().removesuffix(".git").replace("git@github.com:", "https://github.com/")
    return address if address.startswith("https://github.com/") else ""


def badges(app, docname, source):
    """Under every notebook's title: open it in Colab, or download it. What only the tests read is left out."""
    if os.path.splitext(app.env.doc2path(docname))[1] != ".ipynb":
        return
    notebook, line = json.loads(source[0]), f"{{download}}`Download this notebook <{docname}.ipynb>`"
    if address := repository():
        path = address.removeprefix("https://github.com/")
        url = f"https://colab.research.google.com/github/{path}/blob/main/notebooks/{docname}.ipynb"
        first = f"`!git clone {address} ringref && pip install './ringref[notebooks]'`, then `%cd ringref/notebooks`"
        line = f"[Open in Colab]({url}) (there, first {first}) · {line}"
    cell = notebook["cells"][0]
    title, *rest = "".join(cell["source"]).split("\n")
    cell["source"] = "\n".join([title, "", line, *rest])
    for cell in notebook["cells"]:  # a word to nbval, not to readers
        cell["source"] = "".join(cell["source"]).removeprefix("# NBVAL_IGNORE_OUTPUT\n")
    source[0] = json.dumps(notebook)


def setup(app):
    if not repository():
        print("no Colab links: neither RINGREF_REPOSITORY nor git's remote origin names a repository on GitHub")
    app.connect("source-read", badges)
