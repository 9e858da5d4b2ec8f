#!/bin/sh
# Create $VENV and install the project with its pinned dependencies, without root.
#   TORCH=auto  the CPU build if no NVIDIA driver is installed and pip finds one, else the default
#   TORCH=cpu   the CPU build; PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL say where pip finds it
#   TORCH=cuda  the default build with its CUDA libraries
set -eu

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "ladderstitch needs Python 3.11 or newer; '$PYTHON' is $("$PYTHON" --version 2>&1)." >&2
    echo "Use another one: make install PYTHON=python3.11" >&2
    exit 1
fi

if [ ! -x "$VENV/bin/pip" ]; then
    "$PYTHON" -m venv "$VENV" 2>/dev/null ||
        "$PYTHON" -m virtualenv -q "$VENV" 2>/dev/null ||
        uv venv --seed -q -p "$PYTHON" "$VENV" 2>/dev/null || {
        rm -rf "$VENV"
        echo "Could not create $VENV: this Python has no venv module. Run one of these first:" >&2
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
    # PyTorch marks CPU builds with "+cpu". If pip finds none, the default build works, too.
    "$VENV/bin/pip" install -q "$pin+cpu" 2>/dev/null || {
        echo "pip finds no CPU-only build of torch: installing the default build (larger)." >&2
        "$VENV/bin/pip" install -q "$pin"
    }
    ;;
cuda) "$VENV/bin/pip" install -q "$pin" ;;
*)
    echo "TORCH: expected auto, cpu or cuda, got '$TORCH'" >&2
    exit 1
    ;;
esac
# CUDA builds of torch install the triton that they need; the pin is for other builds.
constraints=$VENV/constraints.txt
if "$VENV/bin/pip" show -q triton 2>/dev/null; then
    grep -v '^triton==' constraints.txt >"$constraints"
else
    cp constraints.txt "$constraints"
fi
"$VENV/bin/pip" install -q -c "$constraints" -e '.[dev]'
