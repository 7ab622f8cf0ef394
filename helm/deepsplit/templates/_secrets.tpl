{{/* Names of Secrets: the operator's own, or those that the chart makes. */}}

{{- define "deepsplit.keysSecret" -}}
{{- .Values.auth.existingSecret | default (printf "%s-keys" (include "deepsplit.fullname" .)) -}}
{{- end -}}

{{- define "deepsplit.operatorKeySecret" -}}
{{- .Values.auth.operatorKeySecret | default (printf "%s-operator-key" (include "deepsplit.fullname" .)) -}}
{{- end -}}

{{- define "deepsplit.gatewayTlsSecret" -}}
{{- ternary .Values.tls.gateway.secretName (printf "%s-tls" (include "deepsplit.fullname" .)) (eq .Values.tls.gateway.mode "secret") -}}
{{- end -}}

{{- define "deepsplit.internalTlsSecret" -}}
{{- ternary .Values.tls.internal.secretName (printf "%s-internal-tls" (include "deepsplit.fullname" .)) (eq .Values.tls.internal.mode "secret") -}}
{{- end -}}

{{/* Data of a Secret as the cluster has it, base64 values, as YAML; an empty map where there is none.
     Call with (dict "root" $ "name" "x"). */}}
{{- define "deepsplit.kept" -}}
{{- $secret := lookup "v1" "Secret" .root.Release.Namespace .name | default dict -}}
{{- toYaml ($secret.data | default dict) -}}
{{- end -}}

{{/* data: of a TLS Secret from an authority of its own. One that exists is kept as it is, whatever the values say.
     Call with (dict "root" $ "name" "x" "cn" "y" "hosts" (list …)). */}}
{{- define "deepsplit.generatedTls" -}}
{{- $kept := fromYaml (include "deepsplit.kept" .) -}}
{{- if get $kept "tls.crt" -}}
{{- toYaml $kept -}}
{{- else -}}
{{- $days := int .root.Values.tls.generatedDays -}}
{{- $ca := genCAWithKey (printf "%s CA" .cn) $days (genPrivateKey "ecdsa") -}}
{{- $pair := genSignedCertWithKey .cn nil .hosts $days $ca (genPrivateKey "ecdsa") -}}
tls.crt: {{ $pair.Cert | b64enc }}
tls.key: {{ $pair.Key | b64enc }}
ca.crt: {{ $ca.Cert | b64enc }}
{{- end -}}
{{- end -}}
