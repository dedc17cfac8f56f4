# shellcheck shell=bash
# Sourced: `supervise COMMAND…` runs a command so that a stop signal reaches all its processes at once and none outlives this script.
#
# A launcher's ranks must learn of a stop together, since saving is collective. The launcher hands signals on one rank after the other, and dies of
# one sent to itself alone while its ranks train on. So the command gets a process group of its own, and the group is what is signalled.

STOP_GRACE_S=60 # a rank that has not saved and left by then is killed; the checkpoint before stays usable

supervise() {
    local status=0
    setsid "$@" </dev/null &
    SUPERVISED_GROUP=$!
    trap stop_supervised INT TERM HUP
    wait "$SUPERVISED_GROUP" || status=$?
    trap - INT TERM HUP
    end_group # a launcher that was killed leaves its ranks behind
    return "$status"
}

stop_supervised() {
    trap '' INT TERM HUP
    echo "stopping; what is running may finish its step and save (up to $STOP_GRACE_S s)" >&2
    end_group
    exit 130
}

end_group() {
    local waited=0
    kill -TERM -- "-$SUPERVISED_GROUP" 2>/dev/null || return 0
    while kill -0 -- "-$SUPERVISED_GROUP" 2>/dev/null; do
        ((waited < STOP_GRACE_S * 10)) || kill -KILL -- "-$SUPERVISED_GROUP" 2>/dev/null || true
        sleep 0.1
        waited=$((waited + 1))
    done
}

# A port nobody listens on, instead of the launcher's fixed default, which another run may hold.
free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}
