"""What a process needs of its machine: device, memory, ports, versions."""
