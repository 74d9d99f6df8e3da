# shellcheck shell=bash
# Finding and setting up uv; sourced by the scripts beside it, from the repository's root.

export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-300}  # torch is large; some mirrors pause while sending it

# Prints the path of a uv: the user's own, or one in the private .venv-uv.
find_uv() {
    local candidate
    for candidate in uv "$HOME/.local/bin/uv" .venv-uv/bin/uv; do
        if "$candidate" --version >/dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
}

# uv does not read pip's settings. Someone with a mirror or a private certificate has usually told
# pip only, so pass these two on where uv has none of its own.
adopt_pip_settings() {
    local index cert
    index=$("$1" -m pip config get global.index-url 2>/dev/null) || index=""
    cert=$("$1" -m pip config get global.cert 2>/dev/null) || cert=""
    index=${PIP_INDEX_URL:-$index}
    cert=${PIP_CERT:-$cert}
    if [[ -n $index && -z ${UV_DEFAULT_INDEX:-}${UV_INDEX_URL:-} ]]; then
        export UV_DEFAULT_INDEX=$index
    fi
    if [[ -n $cert && -z ${SSL_CERT_FILE:-} ]]; then
        export SSL_CERT_FILE=$cert
    fi
}
