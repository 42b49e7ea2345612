"""The metadata that depends on the address of the project's repository, `tool.imvar.home` in pyproject.toml.

The rest is in pyproject.toml. While `home` is empty, nothing is said of a repository: the description on PyPI has the
README's text without its images and without the links to files, since a relative address leads nowhere there.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
CODE = r"```.*?```|`[^`\n]+`"
LINK = r"(?P<bang>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)"
IMAGE = r"<img\b[^>]*?\bsrc=\"(?P<src>[^\"]+)\"[^>]*>"
ABSOLUTE = re.compile(r"[a-z]+:|#")


def absolute(markdown: str, home: str, version: str) -> str:
    """Return the text with the addresses of files of the repository as of this version, or without them."""

    def replace(match: re.Match[str]) -> str:
        path, is_image = match["target"] or match["src"], bool(match["src"] or match["bang"])
        if path is None or ABSOLUTE.match(path):
            return match[0]
        if not home:
            return "" if is_image else match["text"]
        start, end = (at - match.start() for at in match.span("target" if match["target"] else "src"))
        return match[0][:start] + f"{home}/{'raw' if is_image else 'blob'}/v{version}/{path}" + match[0][end:]

    return re.sub(f"{CODE}|{LINK}|{IMAGE}", replace, markdown, flags=re.DOTALL)


def urls(home: str, version: str) -> dict[str, str]:
    """Return the URLs of the project, by name."""
    return {
        "Homepage": home,
        "Documentation": f"{home}/tree/v{version}/docs",
        "Changelog": f"{home}/blob/v{version}/CHANGELOG.md",
        "Issues": f"{home}/issues",
    }


config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
home, version = config["tool"]["imvar"]["home"].rstrip("/"), config["project"]["version"]
models = {
    "Checkpoint": "https://huggingface.co/lambdalabs/sd-image-variations-diffusers",
    "Reference": "https://github.com/huggingface/diffusers",
}
setup(
    long_description=absolute((ROOT / "README.md").read_text(encoding="utf-8"), home, version),
    long_description_content_type="text/markdown",
    project_urls=models | (urls(home, version) if home else {}),
)
