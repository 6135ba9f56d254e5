"""Host codebases and file formats. Shipped as ``acr_reg.integrations``; see the modules for what each one serves."""
