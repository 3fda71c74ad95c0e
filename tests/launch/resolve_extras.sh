#!/usr/bin/env bash
# Whether the plain package and the extras of the accelerators resolve: pip chooses all packages and
# installs none. Run it with the Python of the image, python3.12, and with the oldest, python3.11:
#
#   tests/launch/resolve_extras.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${1:-python3}
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
"$python" -m venv "$environment"

for package in . '.[tpu]' '.[cuda]'; do
  echo "$package with $("$environment/bin/python" --version):"
  "$environment/bin/pip" install --quiet --dry-run --ignore-installed \
    --report "$environment/report.json" "$package"
  "$environment/bin/python" - "$environment/report.json" <<'END'
import json
import sys

chosen = json.load(open(sys.argv[1]))["install"]
names = {each["metadata"]["name"]: each["metadata"]["version"] for each in chosen}
shown = [n for n in sorted(names) if n.startswith(("jax", "libtpu", "flax", "orbax-checkpoint"))]
print(f"  {len(names)} packages:", ", ".join(f"{name} {names[name]}" for name in shown))
END
done
