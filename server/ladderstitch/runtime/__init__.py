"""Services of the machine and the process: device, memory, ports, versions."""
