"""What mkdocs calls while it builds the site (https://www.mkdocs.org/user-guide/configuration/#hooks)."""

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.generate import commands, python_api, repository, tables

GENERATED = {
    "reference/commands.md": commands.page,
    "reference/python.md": python_api.functions_page,
    "reference/artifacts.md": python_api.artifacts_page,
    "reference/tables.md": tables.page,
}
"""Pages that are told from the code, and what tells them."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append what is written outside of ``docs`` to the navigation."""
    assert config.nav is not None, "mkdocs.yml has a navigation"
    for section, paths in repository.pages().items():
        config.nav.append({section: [repository.uri(path) for path in paths]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of ``docs``."""
    for name, page in GENERATED.items():
        files.append(File.generated(config, name, content=page()))
    for paths in repository.pages().values():
        for path in paths:
            content = (repository.ROOT / path).read_text(encoding="utf-8")
            files.append(File.generated(config, str(repository.uri(path)), content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Links and fences as the site shows them."""
    name = page.file.src_uri
    of_docs = not name.startswith("repository/")
    path = f"{repository.DOCS}/{name}" if of_docs else name.removeprefix("repository/")
    return repository.with_plain_fences(repository.with_links(markdown, path))
