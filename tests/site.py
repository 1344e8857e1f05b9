"""The site as it was built: `python -m tests.site build/site`. Every public name stands on the API's page."""

import ast
import re
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "fastopt" / "__init__.py"


def public_names() -> list[str]:
    """`fastopt.__all__`, read and not imported: who builds the site need not have torch."""
    for node in ast.parse(PACKAGE.read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]:
            return list(ast.literal_eval(node.value))
    raise ValueError(f"{PACKAGE} has no __all__")


def main(site: str) -> int:
    page = Path(site, "api", "index.html").read_text()
    # Some are there by the module that they are in, as a module of the same name stands beside them.
    missing = [name for name in public_names() if not re.search(rf'id="fastopt(\.[a-z_]+)*\.{name}"', page)]
    for name in missing:
        print(f"{site}: the API's page lacks fastopt.{name}", file=sys.stderr)
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
