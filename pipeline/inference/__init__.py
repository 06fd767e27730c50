"""Using trained weights without training: loading, predicting, embedding, evaluating, translating, exporting."""
