#!/bin/sh
# Read by hostfile.sh and run on each machine: what would else be found out there while the other
# machines wait. The last line of what it says is the message.
host=$1 folder=$2 paths=$3 python=$4 address=$5 port=$6 first=$7
cd "$folder" 2>/dev/null || { echo "has no folder $folder"; exit 3; }
[ -x "$python" ] || { echo "has no $python"; exit 3; }
[ "$host" = "$first" ] || port=0
PYTHONPATH=$folder:$paths exec "$python" -c '
import importlib.util, socket, sys

address, port = sys.argv[1], int(sys.argv[2])
for name in ("torch", "deepspeed", "mlkd_dist"):
    if importlib.util.find_spec(name) is None:
        sys.exit(f"has no package {name} in {sys.executable}")
try:
    socket.getaddrinfo(address, None)
except OSError:
    sys.exit(f"does not know the address {address}; set MASTER_ADDR")
if port and socket.socket().connect_ex((address, port)) == 0:
    sys.exit(f"has a program at port {port} already; set MASTER_PORT")
' "$address" "$port"
