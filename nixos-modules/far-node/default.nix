# The node agent on a NixOS blade. Parsed only: no NixOS was ever built with it (see ../README.md).
{ imports = [ ./options.nix ./assertions.nix ./service.nix ]; }
