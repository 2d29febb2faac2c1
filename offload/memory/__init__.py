"""Host memory: who holds how much (ledger), where it is (region), who may use it now (ring)."""
