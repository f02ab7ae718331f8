"""The process that runs a job's stages. Computes nothing itself: it plans, submits, and keeps the ledger."""
