#!/bin/sh
# Create $VENV and install the project with its pinned dependencies; no root needed.
#   TORCH=auto  CPU build where pip can find one and there is no NVIDIA driver, else the default build
#   TORCH=cpu   the CPU build (set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to where it is kept)
#   TORCH=cuda  the default build, with its CUDA libraries
set -eu

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "ladderstitch needs Python 3.11 or newer; '$PYTHON' is $("$PYTHON" --version 2>&1)." >&2
    echo "Name another one: make install PYTHON=python3.11" >&2
    exit 1
fi

if [ ! -x "$VENV/bin/pip" ]; then
    "$PYTHON" -m venv "$VENV" 2>/dev/null ||
        "$PYTHON" -m virtualenv -q "$VENV" 2>/dev/null ||
        uv venv --seed -q -p "$PYTHON" "$VENV" 2>/dev/null || {
        rm -rf "$VENV"
        echo "Could not create $VENV: this Python has no venv module. Any one of these mends it:" >&2
        echo "  apt-get install python3-venv      (root)" >&2
        echo "  $PYTHON -m pip install --user --break-system-packages virtualenv      (no root)" >&2
        exit 1
    }
fi

pin=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
if [ "$TORCH" = auto ]; then
    if command -v nvidia-smi >/dev/null 2>&1; then TORCH=cuda; else TORCH=cpu; fi
fi
case "$TORCH" in
cpu)
    # "+cpu" is how PyTorch marks CPU builds; without one at hand the default build serves as well.
    "$VENV/bin/pip" install -q "$pin+cpu" 2>/dev/null || {
        echo "No CPU-only build of torch at hand: installing the default one (larger, works as well)." >&2
        "$VENV/bin/pip" install -q "$pin"
    }
    ;;
cuda) "$VENV/bin/pip" install -q "$pin" ;;
*)
    echo "TORCH: expected auto, cpu or cuda, got '$TORCH'" >&2
    exit 1
    ;;
esac
# CUDA builds of torch bring the triton that they were made with; the pin is for the others.
constraints=$VENV/constraints.txt
if "$VENV/bin/pip" show -q triton 2>/dev/null; then
    grep -v '^triton==' constraints.txt >"$constraints"
else
    cp constraints.txt "$constraints"
fi
"$VENV/bin/pip" install -q -c "$constraints" -e '.[dev]'
