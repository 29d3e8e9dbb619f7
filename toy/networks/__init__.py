"""Networks that learn a mixture's score, and what trainers tune on top of them."""
