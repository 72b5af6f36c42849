"""bundle → answers: image decoding, embedding, collections, the gRPC server and its client. Never torch."""
