# processes.sh: background processes of the cluster, one per component. Sourced by up.sh and down.sh.
# $RUN/NAME.pid holds "PID START": a pid comes back after a reboot or when the counter wraps, a pid that started
# at that very tick does not, so nothing is ever signalled that is not ours.

start_of() { # start_of PID: when it started, in ticks since boot (field 22 of stat; the name before may hold blanks)
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  set -- ${stat##*) }
  echo "${20}"
}
pid_of() { # pid_of NAME: prints the pid of the component if it runs
  local pid start
  [ -s "$RUN/$1.pid" ] && read -r pid start <"$RUN/$1.pid" && [ "$(start_of "$pid")" = "$start" ] && echo "$pid"
}
made_of() { # made_of COMMAND...: the command and the state of every file that it reads
  local word
  for word in "$@"; do
    echo "$word"
    case ${word#--*=} in "$LOG"/*) continue ;; esac
    [ ! -f "${word#--*=}" ] || stat --format '%n %s %Y' "${word#--*=}"
  done
}
launch() { # launch NAME COMMAND...: in the background, unless it runs with this very command and these files already
  local name=$1
  shift
  if pid_of "$name" >/dev/null; then
    [ "$(made_of "$@")" != "$(cat "$RUN/$name.made-of" 2>/dev/null)" ] || return 0
    say "$name: its arguments or files changed"
    stop 5 "$name"
  fi
  [ "$(stat --format %s "$LOG/$name.log" 2>/dev/null || echo 0)" -lt 50000000 ] || mv "$LOG/$name.log" "$LOG/$name.log.1"
  setsid "$@" >>"$LOG/$name.log" 2>&1 </dev/null 9>&- &
  echo "$! $(start_of $!)" >"$RUN/$name.pid"
  made_of "$@" >"$RUN/$name.made-of"
  say "$name: started"
}
launch_inside() { # launch_inside NAME COMMAND...: in the cluster's network namespace
  local name=$1
  shift
  launch "$name" nsenter --net="/run/netns/$K8S_NETNS" -- "$@"
}
signal() { # signal SIGNAL NAME...
  local name pid
  for name in "${@:2}"; do
    if pid=$(pid_of "$name"); then kill "-$1" "$pid" 2>/dev/null || true; fi
  done
}
stop() { # stop SECONDS NAME...: all are asked to end; who has not after the time is killed
  local seconds=$1 name tries
  shift
  signal TERM "$@"
  for name in "$@"; do
    for ((tries = seconds * 10; tries > 0; tries--)); do
      pid_of "$name" >/dev/null || break
      sleep 0.1
    done
    signal KILL "$name"
    rm -f "$RUN/$name.pid"
  done
}
