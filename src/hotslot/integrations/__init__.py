"""What libraries need beyond a plain nn.Module for their own calls to swap adapters; one module each."""
