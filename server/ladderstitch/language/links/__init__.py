"""Links between ranks: threads, shared memory, TCP, NCCL."""
