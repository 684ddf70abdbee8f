"""Put a mixer where a block was: match arguments by value, swap the owner, keep its signature."""
