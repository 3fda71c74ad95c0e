"""The parallel room: meshes, logical axes, and the placing of arrays on a mesh."""
