# vault policy write keyagent vault.hcl
path "transit/encrypt/KEY" { capabilities = ["update"] }
path "transit/decrypt/KEY" { capabilities = ["update"] }
path "transit/keys/KEY"    { capabilities = ["read"] }
