"""Networks with their data side: pictures to ids and back, texts to vectors."""
