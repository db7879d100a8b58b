"""Recordings in other people's formats as RLDS datasets: sources (lerobot, hdf5, npz) and the one writer."""
