;; Writes template code into a message. It comes back as text.
(module
  (import "realm" "chat_template" (func $chat_template (param i32 i32 i32 i32 i32) (result i32)))
  (import "realm" "emit" (func $emit (param i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "[{\22role\22:\22user\22,\22content\22:\22{{ 7*7 }}{% for i in range(99999999) %}x{% endfor %}{{ messages.__class__.__mro__ }}\22}]")
  (func (export "realm_abi_version") (result i32) (i32.const 1))
  (func $run (export "run") (result i32) (local $n i32)
    (local.set $n (call $chat_template (i32.const 0) (i32.const 114) (i32.const 1) (i32.const 1024) (i32.const 8192)))
    (call $emit (i32.const 1024) (local.get $n))))
