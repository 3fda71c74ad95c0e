"""What a step needs and costs before the hardware is rented: memory, operations, bytes, time."""
