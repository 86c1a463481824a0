"""
What `mkdocs.yml` needs to render our notation: GitHub's Markdown in documents, transformers' in docstrings.

In docstrings "x (`int`, defaults to 3): ..." becomes "x (int): ...", whose default the signature shows, and [`name`]
becomes a link to that function or class.
"""

import re

import griffe


PARAMETER = re.compile(r"^( +\*{0,2}([\w, ]+)) \((`.*?)\):", re.MULTILINE)
REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?![(\[])")


def on_page_markdown(markdown: str, **kwargs) -> str:
    """Python-Markdown continues a list's item at 4 spaces, GitHub at the item's text: 3 behind "1."."""
    return re.sub(r"^   (?=\S)", "    ", markdown, flags=re.MULTILINE)


def on_page_content(html: str, **kwargs) -> str:
    """GitHub needs a backslash before a pipe in a table's code, Python-Markdown shows it."""
    return re.sub(r"<td.*?</td>", lambda cell: cell[0].replace(r"\|", "|"), html, flags=re.DOTALL)


def documented(scope: griffe.Module | griffe.Class, paths: dict[str, str]) -> None:
    """Adds the full path of every function and class that its page shows, by its last name."""
    for name, member in scope.members.items():
        if member.is_alias or name.startswith("_"):
            continue
        if isinstance(member, (griffe.Class, griffe.Function)) and member.has_docstring:
            paths.setdefault(name, member.path)
        if isinstance(member, (griffe.Module, griffe.Class)):
            documented(member, paths)


def rewrite(scope: griffe.Object, paths: dict[str, str]) -> None:
    for member in scope.members.values():
        if not member.is_alias:
            rewrite(member, paths)
    if scope.docstring is None:
        return
    # A configuration has no signature to show its defaults, so its text keeps them. That of a dataclass comes later.
    signature = scope.parameters if isinstance(scope, (griffe.Class, griffe.Function)) else ()
    if isinstance(scope, griffe.Class) and any("dataclass" in str(decorator.value) for decorator in scope.decorators):
        signature = scope.members

    def parameter(match: re.Match) -> str:
        start, name, description = match.groups()
        if name in signature:
            description = re.sub(r", (defaults to .*|\*optional\*)", "", description)
        return f"{start} ({re.sub('[`*]', '', description).replace(' or ', ' | ')}):"

    def reference(match: re.Match) -> str:
        name = match[1].rpartition(".")[2]
        return f"[`{name}`][{paths[name]}]" if name in paths else f"`{name}`"

    scope.docstring.value = REFERENCE.sub(reference, PARAMETER.sub(parameter, scope.docstring.value))


class TransformersNotation(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **kwargs) -> None:
        paths: dict[str, str] = {}
        # Its own names first: two packages may use one name.
        for module in (pkg, *loader.modules_collection.members.values()):
            documented(module, paths)
        rewrite(pkg, paths)
